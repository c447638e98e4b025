// Metal's element-wise functions. Half and bfloat are computed in float and rounded once.
#pragma once
#pragma clang system_header
#include "types.h"

namespace metal {
// The usual arithmetic type of two arguments; a vector and a scalar give the vector.
template <class A, class B, bool VA = mh::Vector<A>::is, bool VB = mh::Vector<B>::is> struct Common {
  using type = decltype(A() + B());
};
template <class A, class B, bool VB> struct Common<A, B, true, VB> { using type = A; };
template <class A, class B> struct Common<A, B, false, true> { using type = B; };
template <class A> struct Common<A, A, false, false> { using type = A; };
template <class A, class B> using common_t = typename Common<A, B>::type;
// Functions of one argument take integers to float.
template <class T> using float_result_t = conditional_t<is_integral_v<T>, float, T>;

#define MH_MATH1(name, expr) \
  template <class T> MH_INLINE float_result_t<T> name(T x_) { \
    if constexpr (mh::Vector<T>::is) { \
      T r{}; \
      for (int i = 0; i < mh::Vector<T>::size; ++i) { float x = (float)x_[i]; r[i] = (make_scalar_t<T>)(expr); } \
      return r; \
    } else { float x = (float)x_; return (float_result_t<T>)(expr); } \
  }
MH_MATH1(exp, __builtin_expf(x)) MH_MATH1(exp2, __builtin_exp2f(x)) MH_MATH1(exp10, __builtin_exp10f(x))
MH_MATH1(log, __builtin_logf(x)) MH_MATH1(log2, __builtin_log2f(x)) MH_MATH1(log10, __builtin_log10f(x))
MH_MATH1(sin, __builtin_sinf(x)) MH_MATH1(cos, __builtin_cosf(x)) MH_MATH1(tan, __builtin_tanf(x))
MH_MATH1(asin, __builtin_asinf(x)) MH_MATH1(acos, __builtin_acosf(x)) MH_MATH1(atan, __builtin_atanf(x))
MH_MATH1(sinh, __builtin_sinhf(x)) MH_MATH1(cosh, __builtin_coshf(x)) MH_MATH1(tanh, __builtin_tanhf(x))
MH_MATH1(asinh, __builtin_asinhf(x)) MH_MATH1(acosh, __builtin_acoshf(x)) MH_MATH1(atanh, __builtin_atanhf(x))
MH_MATH1(sqrt, __builtin_sqrtf(x)) MH_MATH1(rsqrt, 1.0f / __builtin_sqrtf(x))
MH_MATH1(floor, __builtin_floorf(x)) MH_MATH1(ceil, __builtin_ceilf(x)) MH_MATH1(trunc, __builtin_truncf(x))
MH_MATH1(rint, __builtin_rintf(x)) MH_MATH1(round, __builtin_roundf(x)) MH_MATH1(fabs, __builtin_fabsf(x))
MH_MATH1(fract, x - __builtin_floorf(x)) MH_MATH1(sign, x > 0 ? 1.0f : (x < 0 ? -1.0f : x))
MH_MATH1(saturate, __builtin_fminf(__builtin_fmaxf(x, 0.0f), 1.0f))
#undef MH_MATH1

#define MH_MATH2(name, expr) \
  template <class A, class B, class C_ = common_t<A, B>> MH_INLINE constexpr C_ name(A a_, B b_) { \
    using E = make_scalar_t<C_>; \
    if constexpr (mh::Vector<C_>::is) { \
      C_ av = mh::make<C_>(a_), bv = mh::make<C_>(b_), r{}; \
      for (int i = 0; i < mh::Vector<C_>::size; ++i) { E a = av[i], b = bv[i]; r[i] = (E)(expr); } \
      return r; \
    } else { E a = (E)a_, b = (E)b_; return (C_)(expr); } \
  }
// The number wins over a NaN, as in Metal's safe mode.
MH_MATH2(max, (a != a ? b : (b != b ? a : (a < b ? b : a))))
MH_MATH2(min, (a != a ? b : (b != b ? a : (b < a ? b : a))))
MH_MATH2(fmax, (a != a ? b : (b != b ? a : (a < b ? b : a))))
MH_MATH2(fmin, (a != a ? b : (b != b ? a : (b < a ? b : a))))
MH_MATH2(pow, __builtin_powf((float)a, (float)b)) MH_MATH2(powr, __builtin_powf((float)a, (float)b))
MH_MATH2(atan2, __builtin_atan2f((float)a, (float)b)) MH_MATH2(fmod, __builtin_fmodf((float)a, (float)b))
MH_MATH2(copysign, __builtin_copysignf((float)a, (float)b)) MH_MATH2(step, (b < a ? 0.0f : 1.0f))
#undef MH_MATH2
MH_INLINE float divide(float a, float b) { return a / b; }

template <class T> MH_INLINE T abs(T x) {
  if constexpr (mh::Vector<T>::is) {
    T r{};
    for (int i = 0; i < mh::Vector<T>::size; ++i) r[i] = x[i] < 0 ? (make_scalar_t<T>)-x[i] : x[i];
    return r;
  } else if constexpr (is_floating_point_v<T>) return (T)__builtin_fabsf((float)x);
  else return x < 0 ? -x : x;
}
template <class T> MH_INLINE T clamp(T x, type_identity_t<T> low, type_identity_t<T> high) {
  return min(max(x, low), high);
}
template <class T> MH_INLINE T fma(T a, T b, type_identity_t<T> c) {
  if constexpr (mh::Vector<T>::is) {
    T r{};
    for (int i = 0; i < mh::Vector<T>::size; ++i)
      r[i] = (make_scalar_t<T>)__builtin_fmaf((float)a[i], (float)b[i], (float)c[i]);
    return r;
  } else return (T)__builtin_fmaf((float)a, (float)b, (float)c);
}
template <class T> MH_INLINE T mad(T a, T b, type_identity_t<T> c) { return fma(a, b, c); }
template <class T, class S> MH_INLINE T mix(T x, T y, S a) { return x + (y - x) * a; }
template <class T, class S> MH_INLINE T select(T a, T b, S choose_b) {
  if constexpr (mh::Vector<T>::is) {
    T r{};
    for (int i = 0; i < mh::Vector<T>::size; ++i) r[i] = choose_b[i] ? b[i] : a[i];
    return r;
  } else return choose_b ? b : a;
}
template <class T> MH_INLINE make_scalar_t<T> dot(T a, T b) {
  make_scalar_t<T> s = make_scalar_t<T>(0);
  for (int i = 0; i < mh::Vector<T>::size; ++i) s += a[i] * b[i];
  return s;
}
template <class T> MH_INLINE make_scalar_t<T> length_squared(T a) { return dot(a, a); }
template <class T> MH_INLINE make_scalar_t<T> length(T a) { return sqrt(dot(a, a)); }
template <class T> MH_INLINE bool isnan(T x) { return __builtin_isnan((float)x); }
template <class T> MH_INLINE bool isinf(T x) { return __builtin_isinf((float)x); }
template <class T> MH_INLINE bool isfinite(T x) { return __builtin_isfinite((float)x); }
template <class T> MH_INLINE bool signbit(T x) { return __builtin_signbit((float)x); }
MH_INLINE float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
template <class V> MH_INLINE bool all(V v) {
  for (int i = 0; i < mh::Vector<V>::size; ++i) if (!v[i]) return false;
  return true;
}
template <class V> MH_INLINE bool any(V v) {
  for (int i = 0; i < mh::Vector<V>::size; ++i) if (v[i]) return true;
  return false;
}

// Integers
template <class T> MH_INLINE T popcount(T x) { return (T)__builtin_popcountl((make_unsigned_t<T>)x); }
template <class T> MH_INLINE T clz(T x) {
  return x == 0 ? (T)(sizeof(T) * 8) : (T)(__builtin_clzl((make_unsigned_t<T>)x) - (64 - sizeof(T) * 8));
}
template <class T> MH_INLINE T ctz(T x) { return x == 0 ? (T)(sizeof(T) * 8) : (T)__builtin_ctzl((ulong)x); }
MH_INLINE uint mulhi(uint a, uint b) { return (uint)((ulong)a * b >> 32); }
MH_INLINE int mulhi(int a, int b) { return (int)((long)a * b >> 32); }
MH_INLINE uint rotate(uint x, uint n) { return x << (n & 31) | x >> (-n & 31); }
MH_INLINE uint reverse_bits(uint x) { return __builtin_bitreverse32(x); }
template <class T> MH_INLINE T extract_bits(T x, uint offset, uint bits) {
  return bits == 0 ? (T)0 : (T)((T)((make_unsigned_t<T>)x << (sizeof(T) * 8 - offset - bits)) >> (sizeof(T) * 8 - bits));
}

// One arithmetic serves both namespaces: Apple's fast approximations are not modelled.
namespace fast = ::metal;
namespace precise = ::metal;
}  // namespace metal
