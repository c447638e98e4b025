// Fibers, rendezvous and barriers. All threads of one threadgroup run as fibers on one core; a fiber
// runs until it must wait for others, so nothing here needs locks.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <unistd.h>
#include "runtime.h"

mh::Fiber* mh_current;
mh::u64 mh_op_counts[mh::OP_COUNT];

namespace mh {
Launch launch;
Report* report;
Fiber fibers[MAX_THREADS];
Group groups[MAX_THREADS / 32];
u32 thread_count, group_count, threadgroup_index, barrier_epoch[2];
u8* stacks;
static u32 barrier_flags;
static void* scheduler_sp;
static u64 random_state, switches;

#define MH_NAME(name) #name,
static const char* const op_names[] = {MH_OPS(MH_NAME)};

// Saves the callee-saved registers, exchanges stacks, restores. Nothing else is live across a call.
extern "C" void mh_switch(void** save, void* to);
asm(R"(.text
.globl mh_switch
.hidden mh_switch
.type mh_switch,@function
mh_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
.size mh_switch,.-mh_switch
)");

const char* describe(u64 tag) {
  static char texts[4][112];
  static u32 turn;
  char* text = texts[turn++ & 3];
  snprintf(text, sizeof texts[0], "%s at %s line %u, column %u", op_names[tag >> 56],
           tag >> 55 & 1 ? "header" : "source", (u32)(tag >> 24) & 0x7fffffff, (u32)tag & 0xffffff);
  return text;
}
const char* last_sync(const Fiber* fiber) { return fiber && fiber->tag ? describe(fiber->tag) : "none"; }

void fail(Code code, const char* format, ...) {
  if (!report->code) {
    report->code = code;
    const U3& g = fibers[0].ids.group_position;
    int used = snprintf(report->message, MESSAGE_BYTES, "threadgroup (%u, %u, %u): ", g.x, g.y, g.z);
    va_list list;
    va_start(list, format);
    vsnprintf(report->message + used, MESSAGE_BYTES - used, format, list);
    va_end(list);
  }
  _exit(3);
}

static inline u32 ready_lanes(const Group& g) { return g.exist & ~(g.done | g.waiting | g.at_barrier); }

static inline void release(Group& g, u32 active) {
  g.active = active;
  if (g.combine) g.combine(g, g.parity, active);
  ++mh_op_counts[g.tag >> 56];
  g.parity ^= 1;
  g.waiting = 0;
}

static inline Fiber* choose(u32 group, u32 ready, u32 from) {
  u32 lane;
  if (launch.order == 0) {
    u32 above = ready & (u32)(~1ull << from);
    lane = __builtin_ctz(above ? above : ready);
  } else if (launch.order == 1) {
    u32 below = ready & ((1u << from) - 1);
    lane = 31 - __builtin_clz(below ? below : ready);
  } else {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    lane = random_state >> 59;
    while (!(ready >> lane & 1)) lane = (lane + 1) & 31;
  }
  return &fibers[group * 32 + lane];
}

static Fiber* any_ready() {
  u32 first = mh_current->group - groups;
  if (launch.order >= 2) first = (random_state >> 33) % group_count;
  for (u32 k = 0; k < group_count; ++k) {
    u32 at = launch.order == 1 ? first + group_count - k : first + k;
    if (at >= group_count) at -= group_count;
    if (u32 ready = ready_lanes(groups[at]))
      return choose(at, ready, at == first ? mh_current->lane : launch.order == 1 ? 0 : 31);
  }
  return nullptr;
}

// Lanes of one SIMD-group wait, but not all of them in the same operation: say who is where.
[[noreturn]] static void divergent_simd(u32 group) {
  Group& g = groups[group];
  const Fiber* lanes = &fibers[group * 32];
  u64 tag = lanes[__builtin_ctz(g.waiting)].tag;
  u32 same = 0, other = 0;
  for (u32 i = 0; i < 32; ++i)
    if (g.waiting >> i & 1) (lanes[i].tag == tag ? same : other) |= 1u << i;
  if (other)
    fail(DIVERGENT_SIMD, "simdgroup %u: lanes 0x%08x wait in %s while lanes 0x%08x wait in %s", group,
         same, describe(tag), other, describe(lanes[__builtin_ctz(other)].tag));
  if (g.at_barrier)
    fail(DIVERGENT_SIMD, "simdgroup %u: lanes 0x%08x wait in %s while lanes 0x%08x wait in %s", group,
         same, describe(tag), g.at_barrier, describe(lanes[__builtin_ctz(g.at_barrier)].tag));
  fail(DIVERGENT_SIMD, "simdgroup %u: lanes 0x%08x wait in %s while lanes 0x%08x have returned", group,
       same, describe(tag), g.done);
}

static void release_barrier() {
  u64 tag = 0;
  u32 returned = 0, first_returned = 0;
  for (u32 i = 0; i < thread_count; ++i) {
    if (fibers[i].group->done >> fibers[i].lane & 1) {
      if (!returned++) first_returned = i;
      continue;
    }
    if (!tag) tag = fibers[i].tag;
    if (fibers[i].tag != tag)
      fail(DIVERGENT_BARRIER, "some threads wait in %s while thread %u waits in %s", describe(tag), i,
           describe(fibers[i].tag));
  }
  if (returned && !(launch.flags & EXITED_LANES_OK))
    fail(DIVERGENT_BARRIER, "%u threads (the first is %u) returned without reaching %s", returned,
         first_returned, describe(tag));
  for (u32 s = 0; s < group_count; ++s) groups[s].at_barrier = 0;
  for (u32 space = 0; space < 2; ++space) barrier_epoch[space] += barrier_flags >> space & 1;
  ++mh_op_counts[OP_threadgroup_barrier];
}

// The next fiber to run, or null when all have returned. Releases whatever can be released.
static Fiber* pick() {
  for (;;) {
    if (Fiber* next = any_ready()) return next;
    bool live = false, released = false;
    for (u32 s = 0; s < group_count; ++s) {
      Group& g = groups[s];
      u32 lanes = g.exist & ~g.done;
      live |= lanes != 0;
      if (!g.waiting) continue;
      if (g.waiting != lanes || g.mixed || !(launch.flags & EXITED_LANES_OK)) divergent_simd(s);
      release(g, lanes);
      released = true;
    }
    if (released) continue;
    if (!live) return nullptr;
    release_barrier();
  }
}

static inline void go(Fiber* next) {
  Fiber* me = mh_current;
  if (next == me) return;
  mh_current = next;
  ++switches;
  mh_switch(&me->sp, next->sp);
}

static inline void yield(Fiber* me, Group& g) {
  u32 ready = ready_lanes(g);
  if (ready && launch.order < 2) go(choose(&g - groups, ready, me->lane));
  else go(pick());
}

extern "C" u32 mh_wait(u64 tag, Combine combine) {
  Fiber* me = mh_current;
  Group& g = *me->group;
  me->tag = tag;
  if (!g.waiting) {
    g.tag = tag;
    g.mixed = false;
    g.combine = combine;
  } else if (tag != g.tag) {
    g.mixed = true;
  }
  g.waiting |= 1u << me->lane;
  if (g.waiting == g.exist && !g.mixed) release(g, g.exist);
  else yield(me, g);
  return g.active;
}
extern "C" u32 mh_lane() { return mh_current->lane; }

extern "C" void mh_threadgroup_barrier(u64 tag, u32 flags) {
  Fiber* me = mh_current;
  me->tag = tag;
  me->group->at_barrier |= 1u << me->lane;
  barrier_flags = flags;
  yield(me, *me->group);
}

static void order_memory(Group& g, u32, u32) {
  for (u32 space = 0; space < 2; ++space) g.epoch[space] += g.barrier_flags >> space & 1;
}
extern "C" void mh_simdgroup_barrier(u64 tag, u32 flags) {
  mh_current->group->barrier_flags = flags;
  mh_wait(tag, &order_memory);
}

extern "C" void mh_bad_source(u64 tag, u32 source) {
  fail(DIVERGENT_SIMD, "%s: lane %u reads lane %u, which is inactive or does not exist", describe(tag),
       mh_current->lane, source);
}

// First and last function of every fiber.
static void fiber_main() {
  mh_entry(launch.args, &mh_current->ids);
  Fiber* me = mh_current;
  me->tag = 0;
  me->group->done |= 1u << me->lane;
  Fiber* next = pick();
  void* dead;
  mh_current = next;
  mh_switch(&dead, next ? next->sp : scheduler_sp);
  __builtin_trap();
}

static void start_fiber(u32 i, U3 in_group, U3 position, U3 positions, U3 size) {
  Fiber& f = fibers[i];
  const U3 &grid = launch.grid, &full = launch.group;
  f.group = &groups[i / 32];
  f.lane = i & 31;
  f.tag = 0;
  f.stack = stacks + (u64)launch.stack_bytes * i;
  f.ids = ThreadIds{
      {position.x * full.x + in_group.x, position.y * full.y + in_group.y, position.z * full.z + in_group.z},
      in_group, position, positions, grid, size, full,
      i & 31, i / 32, group_count, (full.x * full.y * full.z + 31) / 32, i};
  // Stacks start at different cache sets, or all lanes would compete for the same few.
  u64 top = (u64)f.stack + launch.stack_bytes - 64 - (i % 61) * 64;
  void** sp = (void**)(top & ~63ull) - 8;
  memset(sp, 0, 8 * sizeof *sp);
  sp[6] = (void*)&fiber_main;
  f.sp = sp;
}

static u32 clipped(u32 grid, u32 full, u32 position) {
  u32 rest = grid - position * full;
  return rest < full ? rest : full;
}

void run_threadgroup(U3 position, U3 positions) {
  const U3 &grid = launch.grid, &full = launch.group;
  U3 size = {clipped(grid.x, full.x, position.x), clipped(grid.y, full.y, position.y),
             clipped(grid.z, full.z, position.z)};
  thread_count = size.x * size.y * size.z;
  group_count = (thread_count + 31) / 32;
  for (u32 s = 0; s < group_count; ++s) {
    Group& g = groups[s];
    u32 lanes = thread_count - s * 32;
    g.exist = lanes >= 32 ? ~0u : (1u << lanes) - 1;
    g.done = g.waiting = g.at_barrier = 0;
    g.epoch[0] = g.epoch[1] = 0;
  }
  barrier_epoch[0] = barrier_epoch[1] = 0;
  u32 i = 0;
  for (u32 z = 0; z < size.z; ++z)
    for (u32 y = 0; y < size.y; ++y)
      for (u32 x = 0; x < size.x; ++x) start_fiber(i++, {x, y, z}, position, positions, size);
  // NaN in every float type, so that reading what nobody wrote shows in the result.
  u64 bytes = __stop_mh_tg - __start_mh_tg;
  if (bytes > MAX_THREADGROUP_BYTES)
    fail(THREADGROUP_MEMORY, "%llu bytes of threadgroup memory, %d at most", (unsigned long long)bytes,
         (int)MAX_THREADGROUP_BYTES);
  if (bytes) memset(__start_mh_tg, 0xff, bytes);
  if (!random_state) random_state = launch.order * 0x9E3779B97F4A7C15ull + 12345;
  report->threadgroups += 1;
  report->threads += thread_count;
  report->simdgroups += group_count;
  report->threadgroup_memory = bytes;
  mh_current = launch.order == 1 ? &fibers[thread_count - 1] : &fibers[0];
  mh_switch(&scheduler_sp, mh_current->sp);
  report->switches = switches;
}
}  // namespace mh

extern "C" __attribute__((visibility("default"))) const char* mh_op_name(mh::u32 op) { return op < mh::OP_COUNT ? mh::op_names[op] : nullptr; }
