// Metal's scalar and vector types, address spaces, traits, limits and vector constructors.
#pragma once
#pragma clang system_header
#include "abi.h"

typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;

#define __METAL__ 1
#define __METAL_VERSION__ 320
#define kernel
#define thread
#if MH_BFLOAT_CLASS  // methods cannot take address spaces in C++, so that compile goes without
#define device
#define constant const
#define threadgroup
#else
#define device __attribute__((address_space(1)))
#define constant const __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#endif
#define METAL_FUNC inline __attribute__((always_inline))

namespace metal {
template <class T, T V> struct integral_constant { static constexpr T value = V; };
template <bool B> using bool_constant = integral_constant<bool, B>;
typedef bool_constant<true> true_type;
typedef bool_constant<false> false_type;
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> inline constexpr bool is_same_v = __is_same(A, B);
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> using remove_cv_t = __remove_cv(T);
template <class T> using remove_const_t = __remove_const(T);
template <class T> using remove_reference_t = __remove_reference_t(T);
template <class T> struct type_identity { using type = T; };
template <class T> using type_identity_t = typename type_identity<T>::type;
template <class T> T declval();
template <class T> inline constexpr bool is_integral_v = __is_integral(T);
template <class T> struct is_integral : bool_constant<__is_integral(T)> {};
template <class T> inline constexpr bool is_signed_v = __is_signed(T);
template <class T> struct is_signed : bool_constant<__is_signed(T)> {};
template <class T> inline constexpr bool is_unsigned_v = __is_unsigned(T);
template <class T> struct is_unsigned : bool_constant<__is_unsigned(T)> {};
template <class T> using make_unsigned_t = __make_unsigned(T);
}  // namespace metal

namespace mh {
template <class V> struct Vector {
  using element = V;
  static constexpr int size = 1;
  static constexpr bool is = false;
};
}  // namespace mh
#if MH_BFLOAT_CLASS
#include "bfloat_class.h"
#else
typedef __bf16 bfloat;
typedef bfloat bfloat2 __attribute__((ext_vector_type(2)));
typedef bfloat bfloat3 __attribute__((ext_vector_type(3)));
typedef bfloat bfloat4 __attribute__((ext_vector_type(4)));
namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
}
#endif
namespace mh {
template <class T, int N> struct Vector<T __attribute__((ext_vector_type(N)))> {
  using element = T;
  static constexpr int size = N;
  static constexpr bool is = true;
};
}  // namespace mh
typedef half float16_t;
typedef bfloat bfloat16_t;

// 32-byte vectors (long3, long4, ulong3, ulong4) are left out: their accesses cannot be watched.
#define MH_VECTOR2(T) typedef T T##2 __attribute__((ext_vector_type(2)));
#define MH_VECTORS(T) MH_VECTOR2(T) \
  typedef T T##3 __attribute__((ext_vector_type(3))); \
  typedef T T##4 __attribute__((ext_vector_type(4)));
MH_VECTORS(float) MH_VECTORS(half) MH_VECTORS(int) MH_VECTORS(uint) MH_VECTORS(short)
MH_VECTORS(ushort) MH_VECTORS(char) MH_VECTORS(uchar) MH_VECTORS(bool)
MH_VECTOR2(long) MH_VECTOR2(ulong)
#define MH_PACKED(T, N, A) typedef T packed_##T##N __attribute__((ext_vector_type(N), aligned(A)));
MH_PACKED(float, 2, 4) MH_PACKED(float, 4, 4) MH_PACKED(half, 2, 2) MH_PACKED(half, 4, 2)
MH_PACKED(uint, 2, 4) MH_PACKED(uint, 4, 4) MH_PACKED(int, 2, 4) MH_PACKED(int, 4, 4)
MH_PACKED(uchar, 2, 1) MH_PACKED(uchar, 4, 1) MH_PACKED(ushort, 2, 2) MH_PACKED(ushort, 4, 2)

constexpr half operator""h(long double x) { return (half)x; }
constexpr half operator""h(unsigned long long x) { return (half)x; }
constexpr bfloat operator""bf(long double x) { return (bfloat)(float)x; }

namespace mh {
template <class T> inline constexpr bool is_scalar =
    __is_arithmetic(T) || __is_same(T, half) || __is_same(T, bfloat) || __is_enum(T);

template <class V, class A> MH_INLINE constexpr void append(V& v, int& i, A a) {
  using E = typename Vector<V>::element;
  if constexpr (Vector<A>::is) for (int j = 0; j < Vector<A>::size; ++j) v[i++] = (E)a[j];
  else v[i++] = (E)a;
}

// V(...) as Metal reads it: converts element by element, spreads one scalar, joins parts.
// The source rewriter turns vector and template-type constructor calls into this.
template <class V> MH_INLINE constexpr V make() { return V{}; }
template <class V, class A> MH_INLINE constexpr V make(A a) {
  if constexpr (!Vector<V>::is) return (V)a;
  else {
    using E = typename Vector<V>::element;
    V r{};
    if constexpr (Vector<A>::is) {
      static_assert(Vector<A>::size == Vector<V>::size, "vector constructor: wrong number of components");
      for (int j = 0; j < Vector<V>::size; ++j) r[j] = (E)a[j];
    } else for (int j = 0; j < Vector<V>::size; ++j) r[j] = (E)a;
    return r;
  }
}
template <class V, class A, class B, class... R> MH_INLINE constexpr V make(A a, B b, R... rest) {
  if constexpr (!Vector<V>::is) return V(a, b, rest...);
  else {
    static_assert(
        Vector<A>::size + Vector<B>::size + (0 + ... + Vector<R>::size) == Vector<V>::size,
        "vector constructor: wrong number of components");
    V v{};
    int i = 0;
    append(v, i, a);
    append(v, i, b);
    (append(v, i, rest), ...);
    return v;
  }
}
}  // namespace mh

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#define HUGE_VALF __builtin_inff()
#define MAXFLOAT __FLT_MAX__
#define FLT_MAX __FLT_MAX__
#define FLT_MIN __FLT_MIN__
#define FLT_EPSILON __FLT_EPSILON__
#define HALF_MAX 6.5504e+4h
#define M_PI_F 3.14159265358979323846f
#define M_PI_2_F 1.57079632679489661923f
#define M_E_F 2.71828182845904523536f
#define M_LOG2E_F 1.44269504088896340736f
#define M_LN2_F 0.693147180559945309417f
#define M_SQRT2_F 1.41421356237309504880f
#define M_SQRT1_2_F 0.707106781186547524401f
#define INT_MAX __INT_MAX__
#define INT_MIN (-INT_MAX - 1)
#define UINT_MAX 0xffffffffu

namespace metal {
template <class T> inline constexpr bool is_floating_point_v =
    is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> struct is_floating_point : bool_constant<is_floating_point_v<T>> {};
template <class T> inline constexpr bool is_arithmetic_v = is_integral_v<T> || is_floating_point_v<T>;
template <class T> struct is_arithmetic : bool_constant<is_arithmetic_v<T>> {};
template <class T> using make_scalar_t = typename mh::Vector<T>::element;

template <class T> struct numeric_limits {
  static constexpr bool is_integer = true, is_signed = T(-1) < T(0), has_infinity = false;
  static constexpr int digits = sizeof(T) * 8 - is_signed;
  static constexpr T max() { return (T)(~0ul >> (64 - digits)); }
  static constexpr T min() { return (T)(is_signed ? -(long)(~0ul >> (64 - digits)) - 1 : 0); }
  static constexpr T lowest() { return min(); }
};
#define MH_FLOAT_LIMITS(T, BITS, MAX, MIN, EPS) \
  template <> struct numeric_limits<T> { \
    static constexpr bool is_integer = false, is_signed = true, has_infinity = true; \
    static constexpr int digits = BITS; \
    static constexpr T infinity() { return (T)__builtin_inff(); } \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
    static constexpr T max() { return (T)MAX; } \
    static constexpr T lowest() { return (T)-MAX; } \
    static constexpr T min() { return (T)MIN; } \
    static constexpr T epsilon() { return (T)EPS; } \
  };
MH_FLOAT_LIMITS(float, 24, __FLT_MAX__, __FLT_MIN__, __FLT_EPSILON__)
MH_FLOAT_LIMITS(half, 11, 65504.0f, 6.103515625e-05f, 0.0009765625f)
MH_FLOAT_LIMITS(bfloat, 8, 3.38953139e38f, __FLT_MIN__, 0.0078125f)

template <class To, class From> MH_INLINE constexpr To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return __builtin_bit_cast(To, x);
}
}  // namespace metal
