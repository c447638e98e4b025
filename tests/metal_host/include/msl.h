// The Metal standard library that kernels are compiled against, and the helpers that
// MLX puts in front of every custom kernel (elem_to_loc, Limits, ceildiv, log1p).
#pragma once
#pragma clang system_header
#include "atomic.h"
#include "matrix.h"

template <class T> struct Limits {
  static constexpr T finite_max = metal::numeric_limits<T>::max();
  static constexpr T finite_min = metal::numeric_limits<T>::lowest();
  static constexpr T max = metal::numeric_limits<T>::max();
  static constexpr T min = metal::numeric_limits<T>::lowest();
};
#define MH_FLOAT_LIMITS_MLX(T) \
  template <> struct Limits<T> { \
    static constexpr T finite_max = metal::numeric_limits<T>::max(); \
    static constexpr T finite_min = metal::numeric_limits<T>::lowest(); \
    static constexpr T max = metal::numeric_limits<T>::infinity(); \
    static constexpr T min = T(-__builtin_inff()); \
  };
MH_FLOAT_LIMITS_MLX(float) MH_FLOAT_LIMITS_MLX(half)
#if !MH_BFLOAT_CLASS
MH_FLOAT_LIMITS_MLX(bfloat)
#endif

template <class T, class U> MH_INLINE T ceildiv(T n, U m) { return (n + m - 1) / m; }
MH_INLINE float log1p(float x) { return __builtin_log1pf(x); }

// Offset in elements of element `elem` (row-major count) of an array with these strides.
template <class I = int64_t>
MH_INLINE I elem_to_loc(I elem, const constant int* shape, const constant int64_t* strides, int ndim) {
  I loc = 0;
  for (int i = ndim - 1; i >= 0 && elem > 0; --i) {
    loc += (elem % shape[i]) * I(strides[i]);
    elem /= shape[i];
  }
  return loc;
}
using namespace metal;
// double is no type in Metal; long long neither.
#define double mh_error_double_is_not_a_type_in_Metal
