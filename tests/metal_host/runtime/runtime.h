// The runtime's own state: launch description (filled in by Python), report, and shared globals.
// Layouts here are mirrored in launch.py.
#pragma once
#include <cstdint>
#include "../include/abi.h"

namespace mh {
enum { MAX_THREADS = 1024, MAX_BUFFERS = 64, MESSAGE_BYTES = 1024, PAGE = 4096 };
enum { MAX_THREADGROUP_BYTES = 32768 };

enum Code : u32 {
  OK, DIVERGENT_SIMD, DIVERGENT_BARRIER, OUT_OF_BOUNDS, READ_ONLY, MISALIGNED, RACE, UNINITIALISED,
  UNWRITTEN, THREADGROUP_MEMORY, DIVISION, TIMEOUT, CRASH
};
enum Flag : u32 { CHECK = 1, COUNT = 2, EXITED_LANES_OK = 4, NATURAL_ALIGNMENT = 8 };
enum Kind : u32 { INPUT, OUTPUT, FILLED_OUTPUT };

struct Buffer {
  u8* data;
  u64 bytes;
  u32 item_bytes;  // the unit of race and initialisation checks
  u32 kind;
  char name[48];
};
struct Launch {
  U3 grid, group;
  u32 workers, flags, order, timeout_ms, stack_bytes, group_item_bytes, buffer_count, reserved;
  Buffer* buffers;
  void** args;
  u8* arena;        // all buffers lie in this one mapping
  u64 arena_bytes;
  const u8* owner;  // per page of the arena: buffer number, or 255
  u8* touched;      // per byte of the arena: read; then, arena_bytes later: written. Null in plain mode
};
struct Traffic { u64 read, written; };
struct Report {
  u32 code, reserved;
  u64 threadgroups, threads, simdgroups, threadgroup_memory, atomics, switches;
  u64 ops[64];
  Traffic buffers[MAX_BUFFERS], group_memory;
  char message[MESSAGE_BYTES];
};

extern Launch launch;
extern Report* report;
extern Fiber fibers[MAX_THREADS];
extern Group groups[MAX_THREADS / 32];
extern u32 thread_count, group_count, threadgroup_index;
extern u32 barrier_epoch[2];  // threadgroup_barrier count: device, threadgroup memory
extern u8* stacks;

// Ends this worker with a report; only the first failure is kept.
[[noreturn]] void fail(Code code, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* describe(u64 tag);        // "simd_sum at source line 3, column 5"
const char* last_sync(const Fiber*);  // the same for the last operation a thread took part in

void run_threadgroup(U3 position, U3 positions);  // scheduler
void checks_begin();                              // once in each worker
void checks_end();
}  // namespace mh

extern "C" {
void mh_entry(void** args, const mh::ThreadIds* ids);  // generated with the kernel
extern mh::u8 __start_mh_tg[] __attribute__((weak, visibility("hidden")));
extern mh::u8 __stop_mh_tg[] __attribute__((weak, visibility("hidden")));
extern mh::u8 __ehdr_start[] __attribute__((visibility("hidden")));
extern mh::u8 _etext[] __attribute__((visibility("hidden")));
}
