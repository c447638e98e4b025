// Barriers and SIMD-group functions (32 lanes). Values pass through slots in the SIMD-group's
// record; reductions add in the order of an ascending xor butterfly, so all lanes agree bitwise.
#pragma once
#pragma clang system_header
#include "math.h"

namespace metal {
enum class mem_flags : uint {
  mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4, mem_threadgroup_imageblock = 8
};
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags((uint)a | (uint)b); }

#define MH_AT mh::Where at_ = mh::Where::here()
MH_INLINE void threadgroup_barrier(mem_flags f, MH_AT) {
  mh_threadgroup_barrier(at_.tag(mh::OP_threadgroup_barrier), (uint)f);
}
MH_INLINE void simdgroup_barrier(mem_flags f, MH_AT) {
  mh_simdgroup_barrier(at_.tag(mh::OP_simdgroup_barrier), (uint)f);
}
}  // namespace metal

namespace mh {
using metal::is_same_v;
struct Add { template <class T> static T apply(T a, T b) { return (T)(a + b); } };
struct Multiply { template <class T> static T apply(T a, T b) { return (T)(a * b); } };
struct Max { template <class T> static T apply(T a, T b) { return metal::max(a, b); } };
struct Min { template <class T> static T apply(T a, T b) { return metal::min(a, b); } };
struct And { template <class T> static T apply(T a, T b) { return (T)(a & b); } };
struct Or { template <class T> static T apply(T a, T b) { return (T)(a | b); } };
struct Xor { template <class T> static T apply(T a, T b) { return (T)(a ^ b); } };

template <class T> MH_INLINE u32 post(T x, u64 tag, Combine combine, u32& parity) {
  static_assert(sizeof(T) <= SLOT_BYTES, "value too large for a simd operation");
  Fiber* me = mh_current;
  parity = me->group->parity;
  ((T*)me->group->slots[parity])[me->lane] = x;
  return mh_wait(tag, combine);
}

// results[0] = the reduction over the active lanes, paired (0,1)(2,3).. then (0,2)(4,6)..
template <class T, class F> MH_RUNTIME void combine_reduce(Group& g, u32 parity, u32 active) {
  T v[32];
  __builtin_memcpy(v, g.slots[parity], sizeof v);
  if (active == ~0u) {
    for (int n = 16; n; n >>= 1)
      for (int i = 0; i < n; ++i) v[i] = F::apply(v[2 * i], v[2 * i + 1]);
  } else {
    for (int w = 1; w < 32; w <<= 1)
      for (int i = 0; i < 32; i += 2 * w) {
        if (!(active >> (i + w) & 1)) continue;
        v[i] = active >> i & 1 ? F::apply(v[i], v[i + w]) : v[i + w];
        active |= 1u << i;
      }
  }
  *(T*)g.results[parity] = v[0];
}
template <class F, class T> MH_RUNTIME T reduce(T x, u64 tag) {
  static_assert(!is_same_v<T, bool>, "simd reductions take no bool");
  u32 parity;
  post(x, tag, &combine_reduce<T, F>, parity);
  return *(T*)mh_current->group->results[parity];
}

template <class T, class F, bool INCLUSIVE, int START>
MH_RUNTIME void combine_scan(Group& g, u32 parity, u32 active) {
  const T* in = (const T*)g.slots[parity];
  T* out = (T*)g.results[parity];
  T total = (T)START;
  for (int i = 0; i < 32; ++i) {
    if (!(active >> i & 1)) continue;
    T next = F::apply(total, in[i]);
    out[i] = INCLUSIVE ? next : total;
    total = next;
  }
}
template <class F, bool INCLUSIVE, int START, class T> MH_RUNTIME T scan(T x, u64 tag) {
  u32 parity;
  post(x, tag, &combine_scan<T, F, INCLUSIVE, START>, parity);
  return ((T*)mh_current->group->results[parity])[mh_current->lane];
}

// The value of lane `source`; `keep` returns the lane's own value when the source is past the ends.
template <class T> MH_RUNTIME T exchange(T x, u32 source, bool keep, u64 tag) {
  u32 parity, active = post(x, tag, nullptr, parity);
  if (source > 31 && keep) return x;
  if (source > 31 || !(active >> source & 1)) mh_bad_source(tag, source);
  return ((T*)mh_current->group->slots[parity])[source];
}
template <class T> MH_RUNTIME T exchange_first(T x, u64 tag) {
  u32 parity, active = post(x, tag, nullptr, parity);
  return ((T*)mh_current->group->slots[parity])[__builtin_ctz(active)];
}
struct Ballot { u32 votes, active; };
static MH_RUNTIME Ballot ballot(bool b, u64 tag) {
  u32 parity, active = post((u32)b, tag, nullptr, parity), votes = 0;
  const u32* in = (const u32*)mh_current->group->slots[parity];
  for (int i = 0; i < 32; ++i) if ((active >> i & 1) && in[i]) votes |= 1u << i;
  return Ballot{votes, active};
}
}  // namespace mh

namespace metal {
#define MH_REDUCE(name, F) \
  template <class T> MH_INLINE T name(T x, MH_AT) { return mh::reduce<mh::F>(x, at_.tag(mh::OP_##name)); }
MH_REDUCE(simd_sum, Add) MH_REDUCE(simd_product, Multiply) MH_REDUCE(simd_max, Max)
MH_REDUCE(simd_min, Min) MH_REDUCE(simd_and, And) MH_REDUCE(simd_or, Or) MH_REDUCE(simd_xor, Xor)
#define MH_SCAN(name, F, INCLUSIVE, START) \
  template <class T> MH_INLINE T name(T x, MH_AT) { \
    return mh::scan<mh::F, INCLUSIVE, START>(x, at_.tag(mh::OP_##name)); \
  }
MH_SCAN(simd_prefix_inclusive_sum, Add, true, 0) MH_SCAN(simd_prefix_exclusive_sum, Add, false, 0)
MH_SCAN(simd_prefix_inclusive_product, Multiply, true, 1)
MH_SCAN(simd_prefix_exclusive_product, Multiply, false, 1)
// `n` is the argument, `lane` the calling lane, `source` the lane read.
#define MH_SHUFFLE(name, source, keep) \
  template <class T> MH_INLINE T name(T x, ushort n, MH_AT) { \
    uint lane = mh::lane(); (void)lane; \
    return mh::exchange(x, (uint)(source), keep, at_.tag(mh::OP_##name)); \
  }
MH_SHUFFLE(simd_shuffle, n, false) MH_SHUFFLE(simd_broadcast, n, false)
MH_SHUFFLE(simd_shuffle_xor, lane ^ n, false)
MH_SHUFFLE(simd_shuffle_down, lane + n, true) MH_SHUFFLE(simd_shuffle_up, lane - n, true)
MH_SHUFFLE(simd_shuffle_rotate_down, (lane + n) & 31, false)
MH_SHUFFLE(simd_shuffle_rotate_up, (lane - n) & 31, false)
MH_SHUFFLE(quad_broadcast, (lane & ~3u) | (n & 3), false)
MH_SHUFFLE(quad_shuffle, (lane & ~3u) | (n & 3), false)
MH_SHUFFLE(quad_shuffle_xor, lane ^ (n & 3), false)
template <class T> MH_INLINE T simd_shuffle_and_fill_down(T x, T fill, ushort n, MH_AT) {
  uint source = mh::lane() + n;
  T a = mh::exchange(x, source & 31, false, at_.tag(mh::OP_simd_shuffle_and_fill_down));
  T b = mh::exchange(fill, source & 31, false, at_.tag(mh::OP_simd_shuffle_and_fill_down));
  return source < 32 ? a : b;
}
template <class T> MH_INLINE T simd_shuffle_and_fill_up(T x, T fill, ushort n, MH_AT) {
  int source = (int)mh::lane() - n;
  T a = mh::exchange(x, source & 31, false, at_.tag(mh::OP_simd_shuffle_and_fill_up));
  T b = mh::exchange(fill, source & 31, false, at_.tag(mh::OP_simd_shuffle_and_fill_up));
  return source >= 0 ? a : b;
}
template <class T> MH_INLINE T simd_broadcast_first(T x, MH_AT) {
  return mh::exchange_first(x, at_.tag(mh::OP_simd_broadcast_first));
}
#define MH_QUAD(name, F) \
  template <class T> MH_INLINE T name(T x, MH_AT) { \
    x = mh::F::apply(x, mh::exchange(x, mh::lane() ^ 1, false, at_.tag(mh::OP_##name))); \
    return mh::F::apply(x, mh::exchange(x, mh::lane() ^ 2, false, at_.tag(mh::OP_##name))); \
  }
MH_QUAD(quad_sum, Add) MH_QUAD(quad_max, Max) MH_QUAD(quad_min, Min)

struct simd_vote {
  using vote_t = ulong;
  ulong votes, active;
  explicit operator vote_t() const { return votes; }
  bool all() const { return votes == active; }
  bool any() const { return votes != 0; }
};
MH_INLINE simd_vote simd_ballot(bool b, MH_AT) {
  mh::Ballot r = mh::ballot(b, at_.tag(mh::OP_simd_ballot));
  return simd_vote{r.votes, r.active};
}
MH_INLINE bool simd_all(bool b, MH_AT) {
  mh::Ballot r = mh::ballot(b, at_.tag(mh::OP_simd_all));
  return r.votes == r.active;
}
MH_INLINE bool simd_any(bool b, MH_AT) { return mh::ballot(b, at_.tag(mh::OP_simd_any)).votes != 0; }
MH_INLINE bool simd_is_first(MH_AT) {
  return (uint)__builtin_ctz(mh::ballot(true, at_.tag(mh::OP_simd_is_first)).active) == mh::lane();
}
}  // namespace metal
