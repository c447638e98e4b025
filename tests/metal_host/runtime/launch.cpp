// One launch: worker processes share the threadgroups out, the caller waits with a time limit.
// Workers are forked, so a kernel that crashes or never ends cannot harm the caller.
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <fcntl.h>
#include <initializer_list>
#include <poll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>
#include "runtime.h"

namespace mh {
enum { MAX_WORKERS = 64 };

static void on_fault(int signal, siginfo_t* info, void*) {
  const u8* p = (const u8*)info->si_addr;
  u32 thread = mh_current ? mh_current->ids.index_in_group : 0;
  const char* sync = last_sync(mh_current);
  if (signal == SIGFPE) fail(DIVISION, "integer division by zero by thread %u; last synchronisation: %s", thread, sync);
  if (signal == SIGSEGV && info->si_code == SI_KERNEL)
    fail(MISALIGNED, "vector access by thread %u at an address that is no multiple of its size; "
         "last synchronisation: %s", thread, sync);
  if (p >= stacks && p < stacks + (u64)launch.stack_bytes * launch.group.x * launch.group.y * launch.group.z)
    fail(OUT_OF_BOUNDS, "thread %u uses more than %u bytes of stack", thread, launch.stack_bytes);
  for (u32 b = 0; b < launch.buffer_count; ++b) {
    const Buffer& buffer = launch.buffers[b];
    if (p >= buffer.data - 2 * PAGE && p < buffer.data + buffer.bytes + 2 * PAGE)
      fail(OUT_OF_BOUNDS, "access by thread %u at byte %lld of '%s', which has %llu; last synchronisation: %s",
           thread, (long long)(p - buffer.data), buffer.name, (unsigned long long)buffer.bytes, sync);
  }
  fail(CRASH, "signal %d at address %p by thread %u; last synchronisation: %s", signal, p, thread, sync);
}

static void catch_faults() {
  static u8 signal_stack[65536];
  stack_t alternative = {};
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  for (int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP}) sigaction(s, &action, nullptr);
}

static void make_stacks() {
  u32 count = launch.group.x * launch.group.y * launch.group.z;
  stacks = (u8*)mmap(nullptr, (u64)launch.stack_bytes * count, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  for (u32 i = 0; i < count; ++i) mprotect(stacks + (u64)launch.stack_bytes * i, PAGE, PROT_NONE);
}

static u32 positions_along(u32 grid, u32 group) { return (grid + group - 1) / group; }

static void work(u32 worker) {
  catch_faults();
  make_stacks();
  checks_begin();
  U3 n = {positions_along(launch.grid.x, launch.group.x), positions_along(launch.grid.y, launch.group.y),
          positions_along(launch.grid.z, launch.group.z)};
  u64 total = (u64)n.x * n.y * n.z;
  for (u64 k = worker; k < total; k += launch.workers) {
    u64 i = launch.order == 1 ? total - 1 - k : k;
    threadgroup_index = (u32)i;
    run_threadgroup({(u32)(i % n.x), (u32)(i / n.x % n.y), (u32)(i / n.x / n.y)}, n);
  }
  mh_current = nullptr;
  memcpy(report->ops, mh_op_counts, sizeof mh_op_counts);
  checks_end();
}

static void add(Report& sum, const Report& part) {
  sum.threadgroups += part.threadgroups;
  sum.threads += part.threads;
  sum.simdgroups += part.simdgroups;
  sum.atomics += part.atomics;
  sum.switches += part.switches;
  if (part.threadgroup_memory) sum.threadgroup_memory = part.threadgroup_memory;
  for (u32 i = 0; i < 64; ++i) sum.ops[i] += part.ops[i];
  for (u32 i = 0; i < MAX_BUFFERS; ++i) {
    sum.buffers[i].read += part.buffers[i].read;
    sum.buffers[i].written += part.buffers[i].written;
  }
  sum.group_memory.read += part.group_memory.read;
  sum.group_memory.written += part.group_memory.written;
  if (part.code && (!sum.code || sum.code == CRASH)) {
    sum.code = part.code;
    memcpy(sum.message, part.message, MESSAGE_BYTES);
  }
}

static u64 now_ms() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

// Waits until no worker holds the pipe's writing end any more. False at the time limit, or when a
// signal (Ctrl-C) arrives.
static bool wait_for_end(int pipe_end) {
  u64 end = now_ms() + launch.timeout_ms;
  pollfd item = {pipe_end, POLLIN, 0};
  for (;;) {
    u64 now = now_ms();
    int n = now >= end ? 0 : poll(&item, 1, (int)(end - now));
    if (n == 0 || (n < 0 && errno == EINTR)) return false;
    if (n > 0) return true;
  }
}

extern "C" __attribute__((visibility("default"))) int mh_run(const Launch* request, Report* result) {
  launch = *request;
  u32 workers = launch.workers < MAX_WORKERS ? launch.workers : (u32)MAX_WORKERS;
  launch.workers = workers;
  memset(result, 0, sizeof *result);
  Report* parts = (Report*)mmap(nullptr, sizeof(Report) * workers, PROT_READ | PROT_WRITE,
                                MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  int ends[2];
  if (parts == MAP_FAILED || pipe2(ends, O_CLOEXEC)) return errno;
  pid_t parent = getpid(), pids[MAX_WORKERS];
  u32 started = 0;
  for (; started < workers; ++started) {
    pids[started] = fork();
    if (pids[started] < 0) break;
    if (pids[started]) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(4);
    close(ends[0]);
    report = &parts[started];
    work(started);
    _exit(0);
  }
  close(ends[1]);
  bool complete = started == workers && wait_for_end(ends[0]);
  close(ends[0]);
  if (!complete)
    for (u32 w = 0; w < started; ++w) kill(pids[w], SIGKILL);
  for (u32 w = 0; w < started; ++w) {
    int status = 0;
    while (waitpid(pids[w], &status, 0) < 0 && errno == EINTR) {}
    if (status && !parts[w].code) {
      parts[w].code = complete ? CRASH : TIMEOUT;
      snprintf(parts[w].message, MESSAGE_BYTES, complete ? "a worker process died with status 0x%x"
               : "stopped after %u ms: an endless loop, or give a larger timeout",
               complete ? (u32)status : launch.timeout_ms);
    }
    add(*result, parts[w]);
  }
  munmap(parts, sizeof(Report) * workers);
  return started == workers ? 0 : EAGAIN;
}
}  // namespace mh

// Round to nearest even. clang calls this for float to bfloat; linking its own library for it is slow.
extern "C" __bf16 __truncsfbf2(float x) {
  mh::u32 u = __builtin_bit_cast(mh::u32, x);
  bool nan = (u & 0x7fffffff) > 0x7f800000;
  unsigned short r = nan ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return __builtin_bit_cast(__bf16, r);
}
