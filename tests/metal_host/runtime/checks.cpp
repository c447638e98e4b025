// Watching memory: sanitizer-coverage calls back before every load and store of the kernel.
// Counts bytes, and in checked mode finds bad addresses, races and reads of unwritten memory.
#include <cstdio>
#include <sys/mman.h>
#include "runtime.h"

namespace mh {
enum AccessKind : u32 { READ = 1, WRITE = 2, ATOMIC = 4 };  // ATOMIC joins one of or both others

struct Access {
  u32 thread;             // 1 + threadgroup index * 1024 + thread index in its threadgroup; 0 = none
  u32 epoch, simd_epoch;  // barriers passed before it
};
// History of one element. Readers are kept so that a later write by anyone else meets one it
// conflicts with: the latest reader, the latest of another lane, and of another SIMD-group.
struct Cell {
  Access writer, reader, lane_reader, group_reader, atomic;
  u32 first_reading_group;  // 1 + index of the threadgroup that read first; device memory only
  u32 init;                 // 1 + index of the threadgroup that wrote
  bool many_reading_groups;
};
static Cell *cells[MAX_BUFFERS], *group_cells;
static bool checked;

static void* reserve(u64 bytes) {
  return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
void checks_begin() {
  checked = launch.flags & CHECK;
  if (!checked) return;
  for (u32 b = 0; b < launch.buffer_count; ++b)
    if (launch.buffers[b].kind != INPUT)
      cells[b] = (Cell*)reserve((launch.buffers[b].bytes / launch.buffers[b].item_bytes + 1) * sizeof(Cell));
  group_cells = (Cell*)reserve((MAX_THREADGROUP_BYTES + 64) / launch.group_item_bytes * sizeof(Cell));
}
void checks_end() {
  if (!checked) return;
  for (u32 b = 0; b < launch.buffer_count; ++b) {
    const Buffer& buffer = launch.buffers[b];
    u64 missing = 0, first = 0, items = buffer.bytes / buffer.item_bytes;
    if (buffer.kind != OUTPUT) continue;
    for (u64 i = items; i-- > 0;)
      if (!cells[b][i].init) ++missing, first = i;
    if (!missing) continue;
    report->code = UNWRITTEN;
    snprintf(report->message, MESSAGE_BYTES, "%llu of %llu elements of output '%s' were never written (the first is %llu)",
             (unsigned long long)missing, (unsigned long long)items, buffer.name, (unsigned long long)first);
    return;
  }
}

static const char* verb(u32 kind) { return kind & ATOMIC ? "atomic access" : kind & WRITE ? "write" : "read"; }

struct Place { const char* name; u64 offset; };

// Two accesses are ordered by a barrier of the whole threadgroup that covers this memory, or,
// inside one SIMD-group, by a simdgroup_barrier that does.
static inline bool conflicts(const Access& a, u32 thread, u32 epoch, u32 simd_epoch, bool device_memory) {
  if (!a.thread || a.thread == thread) return false;
  u32 theirs = a.thread - 1, mine = thread - 1;
  if (theirs / 1024 != mine / 1024) return device_memory;
  if (a.epoch != epoch) return false;
  return theirs % 1024 / 32 != mine % 1024 / 32 || a.simd_epoch == simd_epoch;
}

[[noreturn]] static void race(u32 kind, Place at, const Access& other, const char* did) {
  u32 theirs = other.thread - 1;
  const ThreadIds& me = mh_current->ids;
  fail(RACE, "%s of '%s' byte %llu by thread %u (simdgroup %u) is not ordered with the %s by thread %u "
       "(simdgroup %u) of threadgroup number %u; last synchronisation of this thread: %s",
       verb(kind), at.name, (unsigned long long)at.offset, me.index_in_group, me.simdgroup, did,
       theirs % 1024, theirs % 1024 / 32, theirs / 1024, last_sync(mh_current));
}

static void remember_reader(Cell& c, const Access& now) {
  u32 mine = now.thread - 1;
  if (c.reader.thread && c.reader.thread != now.thread) {
    u32 theirs = c.reader.thread - 1;
    (theirs / 32 == mine / 32 ? c.lane_reader : c.group_reader) = c.reader;
  }
  c.reader = now;
}

static void check_cell(Cell& c, u32 kind, bool device_memory, bool initialised, Place at) {
  const Fiber* me = mh_current;
  u32 space = device_memory ? 0 : 1, group = threadgroup_index + 1;
  Access now = {threadgroup_index * 1024 + me->ids.index_in_group + 1, barrier_epoch[space],
                me->group->epoch[space]};
  auto against = [&](const Access& other, const char* did) {
    if (conflicts(other, now.thread, now.epoch, now.simd_epoch, device_memory)) race(kind, at, other, did);
  };
  against(c.writer, "write");
  if (!(kind & ATOMIC)) against(c.atomic, "atomic access");
  if (kind & WRITE) {
    against(c.reader, "read");
    against(c.lane_reader, "read");
    against(c.group_reader, "read");
    if (device_memory && (c.many_reading_groups || (c.first_reading_group && c.first_reading_group != group)))
      fail(RACE, "%s of '%s' byte %llu by thread %u, which another threadgroup reads", verb(kind), at.name,
           (unsigned long long)at.offset, me->ids.index_in_group);
  }
  // What another threadgroup left in threadgroup memory does not count.
  bool written = c.init && (device_memory || c.init == group);
  if (kind & READ && !initialised && !written)
    fail(UNINITIALISED, "thread %u reads byte %llu of '%s', which nobody has written; last synchronisation: %s",
         me->ids.index_in_group, (unsigned long long)at.offset, at.name, last_sync(me));
  if (kind == READ) {  // an atomic read is no plain reader: atomic writes may pass it
    remember_reader(c, now);
    if (!c.first_reading_group) c.first_reading_group = group;
    else c.many_reading_groups |= c.first_reading_group != group;
  } else if (kind & WRITE) {
    (kind & ATOMIC ? c.atomic : c.writer) = now;
    c.init = group;
  }
}

static void check_span(Cell* table, u32 item, u64 offset, u32 bytes, u32 kind, bool device_memory,
                       bool initialised, const char* name) {
  for (u64 i = offset / item; i <= (offset + bytes - 1) / item; ++i)
    check_cell(table[i], kind, device_memory, initialised, {name, i * item});
}

// An address in no buffer: name the buffer it is nearest to.
[[noreturn]] static void out_of_bounds(const u8* p, u32 bytes, u32 kind) {
  const Buffer* best = nullptr;
  u64 best_distance = 1ull << 32;
  for (u32 b = 0; b < launch.buffer_count; ++b) {
    const Buffer& buffer = launch.buffers[b];
    u64 distance = p < buffer.data ? buffer.data - p : p - (buffer.data + buffer.bytes);
    if (distance < best_distance) best = &buffer, best_distance = distance;
  }
  if (!best)
    fail(OUT_OF_BOUNDS, "%s of %u bytes by thread %u at an address in no buffer; last synchronisation: %s",
         verb(kind), bytes, mh_current->ids.index_in_group, last_sync(mh_current));
  fail(OUT_OF_BOUNDS, "%s of %u bytes by thread %u at byte %lld of '%s', which has %llu; last synchronisation: %s",
       verb(kind), bytes, mh_current->ids.index_in_group, (long long)(p - best->data), best->name,
       (unsigned long long)best->bytes, last_sync(mh_current));
}

#define MH_ALWAYS __attribute__((always_inline)) static inline

// Sizes are constants in the callbacks below, so that this becomes one store.
MH_ALWAYS void touch(u64 at, u32 bytes, bool written) {
  __builtin_memset(launch.touched + (written ? launch.arena_bytes : 0) + at, 1, bytes);
}

__attribute__((noinline)) static void check_device(u32 owner, const u8* p, u32 bytes, u32 kind) {
  const Buffer& buffer = launch.buffers[owner];
  if (kind & WRITE && buffer.kind == INPUT)
    fail(READ_ONLY, "thread %u writes byte %llu of input '%s'", mh_current->ids.index_in_group,
         (unsigned long long)(p - buffer.data), buffer.name);
  if (bytes > 1 && (u64)p % bytes && launch.flags & NATURAL_ALIGNMENT)
    fail(MISALIGNED, "%s of %u bytes at byte %llu of '%s' by thread %u", verb(kind), bytes,
         (unsigned long long)(p - buffer.data), buffer.name, mh_current->ids.index_in_group);
  if (buffer.kind != INPUT)
    check_span(cells[owner], buffer.item_bytes, p - buffer.data, bytes, kind, true,
               buffer.kind == FILLED_OUTPUT, buffer.name);
}

__attribute__((noinline)) static void check_group_memory(const u8* p, u32 bytes, u32 kind) {
  if (bytes > 1 && (u64)p % bytes && launch.flags & NATURAL_ALIGNMENT)
    fail(MISALIGNED, "%s of %u bytes at byte %llu of threadgroup memory by thread %u", verb(kind), bytes,
         (unsigned long long)(p - __start_mh_tg), mh_current->ids.index_in_group);
  check_span(group_cells, launch.group_item_bytes, p - __start_mh_tg, bytes, kind, false, false,
             "threadgroup memory");
}

MH_ALWAYS void count(Traffic& traffic, u32 bytes, u32 kind) {
  if (kind & READ) traffic.read += bytes;
  if (kind & WRITE) traffic.written += bytes;
}

MH_ALWAYS void watch(const u8* p, u32 bytes, u32 kind) {
  const Fiber* me = mh_current;
  if (!me || (u64)(p - me->stack) < launch.stack_bytes) return;
  u64 at = p - launch.arena;
  if (at < launch.arena_bytes) {
    u32 owner = launch.owner[at / PAGE];
    if (owner == 255) out_of_bounds(p, bytes, kind);
    const Buffer& buffer = launch.buffers[owner];
    if (p < buffer.data || p + bytes > buffer.data + buffer.bytes) out_of_bounds(p, bytes, kind);
    count(report->buffers[owner], bytes, kind);
    if (kind & READ) touch(at, bytes, false);
    if (kind & WRITE) touch(at, bytes, true);
    if (checked) check_device(owner, p, bytes, kind);
  } else if (p >= __start_mh_tg && p < __stop_mh_tg) {
    if (p + bytes > __stop_mh_tg) out_of_bounds(p, bytes, kind);
    count(report->group_memory, bytes, kind);
    if (checked) check_group_memory(p, bytes, kind);
  } else if (!(p >= __ehdr_start && p < _etext && kind == READ)) {
    // Constant tables lie before the end of the code in this library.
    out_of_bounds(p, bytes, kind);
  }
}

static inline u32* announced(const volatile void* p, u32 kind) {
  ++report->atomics;
  if (launch.flags & (CHECK | COUNT)) watch((const u8*)p, 4, kind | ATOMIC);
  return (u32*)p;
}

extern "C" {
u32 mh_atomic_load(const volatile void* p) { return __atomic_load_n(announced(p, READ), __ATOMIC_RELAXED); }
void mh_atomic_store(volatile void* p, u32 value) {
  __atomic_store_n(announced(p, WRITE), value, __ATOMIC_RELAXED);
}
u32 mh_atomic_exchange(volatile void* p, u32 value) {
  return __atomic_exchange_n(announced(p, READ | WRITE), value, __ATOMIC_RELAXED);
}
void mh_atomic_announce(const volatile void* p) { announced(p, READ | WRITE); }
u32 mh_atomic_peek(const volatile void* p) { return __atomic_load_n((u32*)p, __ATOMIC_RELAXED); }
bool mh_atomic_compare_exchange(volatile void* p, u32* expected, u32 desired) {
  return __atomic_compare_exchange_n((u32*)p, expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

#define MH_CALLBACK(n) \
  void __sanitizer_cov_load##n(const u8* p) { watch(p, n, READ); } \
  void __sanitizer_cov_store##n(const u8* p) { watch(p, n, WRITE); }
MH_CALLBACK(1) MH_CALLBACK(2) MH_CALLBACK(4) MH_CALLBACK(8) MH_CALLBACK(16)

// Calls from -fsanitize=array-bounds,integer-divide-by-zero; the data starts with the location.
struct SourceLocation { const char* file; u32 line, column; };
void __ubsan_handle_out_of_bounds(const SourceLocation* where, u64 index) {
  fail(OUT_OF_BOUNDS, "array index %lld at %s line %u, column %u by thread %u", (long long)index, where->file,
       where->line, where->column, mh_current->ids.index_in_group);
}
void __ubsan_handle_divrem_overflow(const SourceLocation* where, u64, u64) {
  fail(DIVISION, "integer division at %s line %u, column %u by thread %u", where->file, where->line,
       where->column, mh_current->ids.index_in_group);
}
}
}  // namespace mh
