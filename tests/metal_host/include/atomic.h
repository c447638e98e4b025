// Relaxed atomics on 32-bit int, uint and float. They go through the runtime, which may run
// threadgroups in several processes, counts them, and in checked mode tells them from plain accesses.
#pragma once
#pragma clang system_header
#include "simd.h"

namespace metal {
enum memory_order { memory_order_relaxed };
template <class T> struct atomic {
  static_assert(
      is_same_v<T, int> || is_same_v<T, uint> || is_same_v<T, float>,
      "atomics exist for 32-bit int, uint and float only");
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;

#define MH_PTR ((volatile void*)p)
#define MH_RMW(SPACE, name, expr) \
  template <class T> MH_INLINE T atomic_fetch_##name##_explicit( \
      volatile SPACE atomic<T>* p, type_identity_t<T> x, memory_order) { \
    mh_atomic_announce(MH_PTR); \
    uint seen = mh_atomic_peek(MH_PTR); \
    T old; \
    do { old = as_type<T>(seen); } \
    while (!mh_atomic_compare_exchange(MH_PTR, &seen, as_type<uint>((T)(expr)))); \
    return old; \
  }
#define MH_ATOMICS(SPACE) \
  template <class T> MH_INLINE T atomic_load_explicit(const volatile SPACE atomic<T>* p, memory_order) { \
    return as_type<T>(mh_atomic_load(MH_PTR)); \
  } \
  template <class T> MH_INLINE void atomic_store_explicit( \
      volatile SPACE atomic<T>* p, type_identity_t<T> x, memory_order) { \
    mh_atomic_store(MH_PTR, as_type<uint>(x)); \
  } \
  template <class T> MH_INLINE T atomic_exchange_explicit( \
      volatile SPACE atomic<T>* p, type_identity_t<T> x, memory_order) { \
    return as_type<T>(mh_atomic_exchange(MH_PTR, as_type<uint>(x))); \
  } \
  template <class T> MH_INLINE bool atomic_compare_exchange_weak_explicit( \
      volatile SPACE atomic<T>* p, T* expected, type_identity_t<T> x, memory_order, memory_order) { \
    mh_atomic_announce(MH_PTR); \
    uint seen = as_type<uint>(*expected); \
    bool done = mh_atomic_compare_exchange(MH_PTR, &seen, as_type<uint>(x)); \
    *expected = as_type<T>(seen); \
    return done; \
  } \
  MH_RMW(SPACE, add, old + x) MH_RMW(SPACE, sub, old - x) \
  MH_RMW(SPACE, max, old < x ? x : old) MH_RMW(SPACE, min, x < old ? x : old) \
  MH_RMW(SPACE, and, old & x) MH_RMW(SPACE, or, old | x) MH_RMW(SPACE, xor, old ^ x)
MH_ATOMICS(device)
#if !MH_BFLOAT_CLASS
MH_ATOMICS(threadgroup)
#endif
}  // namespace metal
