// What kernels and the runtime share: one fiber a thread, groups of 32 lanes, rendezvous.
// No libc header is included here, because kernels are compiled without any.
#pragma once
#pragma clang system_header

namespace mh {
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

// Every synchronising operation, in the order of its number. Python reads the names back.
#define MH_OPS(X) \
  X(none) X(threadgroup_barrier) X(simdgroup_barrier) X(simdgroup_load) X(simdgroup_store) \
  X(simdgroup_multiply) X(simd_sum) X(simd_product) X(simd_max) X(simd_min) X(simd_and) X(simd_or) \
  X(simd_xor) X(simd_prefix_inclusive_sum) X(simd_prefix_exclusive_sum) \
  X(simd_prefix_inclusive_product) X(simd_prefix_exclusive_product) X(simd_shuffle) \
  X(simd_broadcast) X(simd_shuffle_xor) X(simd_shuffle_down) X(simd_shuffle_up) \
  X(simd_shuffle_rotate_down) X(simd_shuffle_rotate_up) X(simd_shuffle_and_fill_down) \
  X(simd_shuffle_and_fill_up) X(simd_broadcast_first) X(simd_ballot) X(simd_all) X(simd_any) \
  X(simd_is_first) X(quad_shuffle) X(quad_broadcast) X(quad_shuffle_xor) X(quad_sum) X(quad_max) \
  X(quad_min)
#define MH_ENUM(name) OP_##name,
enum Op : u32 { MH_OPS(MH_ENUM) OP_COUNT };
#undef MH_ENUM

// Where an operation stands in the kernel text: op:8 | in header:1 | line:31 | column:24.
struct Where {
  u32 line, column;
  bool header;
  // Texts are named "source/..." and "header/..." by #line, so one letter tells them apart.
  static constexpr Where here(
      u32 line = __builtin_LINE(), u32 column = __builtin_COLUMN(),
      const char* file = __builtin_FILE()) {
    return Where{line, column, file[0] == 'h'};
  }
  constexpr u64 tag(Op op) const {
    return (u64)op << 56 | (u64)header << 55 | (u64)(line & 0x7fffffffu) << 24 | (column & 0xffffffu);
  }
};

struct Group;
typedef void (*Combine)(Group& group, u32 parity, u32 active);

enum { SLOT_BYTES = 32 };  // the largest value a lane may exchange

// One SIMD-group. Slots and results are doubled, because a lane may enter the next operation
// before a slow lane has read what the last one produced; it cannot get two operations ahead.
struct Group {
  u32 exist, done, waiting, at_barrier;  // lane masks
  u32 active;                            // lanes that took part in the last operation
  u32 parity;
  u32 barrier_flags;
  bool mixed;                            // lanes wait in different operations
  u64 tag;
  Combine combine;
  u32 epoch[2];                          // simdgroup_barrier count: device, threadgroup memory
  alignas(64) u8 slots[2][32 * SLOT_BYTES];
  alignas(64) u8 results[2][32 * SLOT_BYTES];
};

struct U3 { u32 x, y, z; };

// Values of the Metal thread attributes.
struct ThreadIds {
  U3 position_in_grid, position_in_group, group_position, groups_per_grid, threads_per_grid;
  U3 threads_per_group, dispatched_threads_per_group;
  u32 lane, simdgroup, simdgroups, dispatched_simdgroups, index_in_group;
};

struct Fiber {
  void* sp;
  Group* group;
  u32 lane;
  u64 tag;      // the operation it waits in, or last left
  u8* stack;
  ThreadIds ids;
};
}  // namespace mh

extern "C" {
extern mh::Fiber* mh_current __attribute__((visibility("hidden")));
mh::u32 mh_wait(mh::u64 tag, mh::Combine combine);
mh::u32 mh_lane();
extern mh::u64 mh_op_counts[mh::OP_COUNT] __attribute__((visibility("hidden")));
void mh_threadgroup_barrier(mh::u64 tag, mh::u32 flags);
void mh_simdgroup_barrier(mh::u64 tag, mh::u32 flags);
void mh_bad_source(mh::u64 tag, mh::u32 source);
mh::u32 mh_atomic_load(const volatile void* p);
void mh_atomic_store(volatile void* p, mh::u32 value);
mh::u32 mh_atomic_exchange(volatile void* p, mh::u32 value);
bool mh_atomic_compare_exchange(volatile void* p, mh::u32* expected, mh::u32 desired);
// A read-modify-write is announced once, however often its compare-exchange loop runs.
void mh_atomic_announce(const volatile void* p);
mh::u32 mh_atomic_peek(const volatile void* p);
}

// Code of the runtime inside kernels: neither counted nor checked, hence never inlined into them.
#define MH_RUNTIME __attribute__((noinline, no_sanitize("coverage", "array-bounds")))
#define MH_INLINE __attribute__((always_inline)) inline

namespace mh {
// Builds that watch memory ask the runtime, so that its own records never count as kernel accesses.
#if MH_WATCHED
MH_INLINE u32 lane() { return mh_lane(); }
#else
MH_INLINE u32 lane() { return mh_current->lane; }
#endif
}  // namespace mh

// Threadgroup variables live in a section of their own; its bounds give size and addresses.
#define MH_THREADGROUP static __attribute__((used, section("mh_tg"), aligned(16)))
