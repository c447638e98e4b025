// Makes a Metal kernel body compile for mx.fast.cuda_kernel (NVRTC, sm_80 and later).
// cuda.py removes the address-space words first; a SIMD-group is a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define HYDRA_CUDA 1
#define HYDRA_FN inline __device__
typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned char uchar;
typedef __nv_bfloat16 bfloat16_t;
typedef __half float16_t;

inline __device__ int threadIdx_lane_() {
  return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) & 31;
}

namespace metal {
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
inline __device__ mem_flags operator|(mem_flags a, mem_flags b) {
  return static_cast<mem_flags>(static_cast<int>(a) | static_cast<int>(b));
}
inline __device__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
inline __device__ void simdgroup_barrier(mem_flags) { __syncwarp(); }

template <class T> inline __device__ T simd_shuffle(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
template <class T> inline __device__ T simd_broadcast(T x, ushort lane) { return __shfl_sync(~0u, x, lane); }
template <class T> inline __device__ T simd_shuffle_xor(T x, ushort m) { return __shfl_xor_sync(~0u, x, m); }
template <class T> inline __device__ T simd_shuffle_down(T x, ushort d) { return __shfl_down_sync(~0u, x, d); }
template <class T> inline __device__ T simd_shuffle_up(T x, ushort d) { return __shfl_up_sync(~0u, x, d); }
template <class T> inline __device__ T simd_sum(T x) {
  for (int m = 1; m < 32; m <<= 1) x += __shfl_xor_sync(~0u, x, m);
  return x;
}
template <class T> inline __device__ T simd_max(T x) {
  for (int m = 1; m < 32; m <<= 1) { T o = __shfl_xor_sync(~0u, x, m); x = x < o ? o : x; }
  return x;
}
template <class T> inline __device__ T simd_min(T x) {
  for (int m = 1; m < 32; m <<= 1) { T o = __shfl_xor_sync(~0u, x, m); x = o < x ? o : x; }
  return x;
}

inline __device__ float exp(float x) { return ::expf(x); }
inline __device__ float exp2(float x) { return ::exp2f(x); }
inline __device__ float log(float x) { return ::logf(x); }
inline __device__ float log2(float x) { return ::log2f(x); }
inline __device__ float sqrt(float x) { return ::sqrtf(x); }
inline __device__ float rsqrt(float x) { return ::rsqrtf(x); }
inline __device__ float fabs(float x) { return ::fabsf(x); }
inline __device__ float abs(float x) { return ::fabsf(x); }
inline __device__ float floor(float x) { return ::floorf(x); }
inline __device__ float round(float x) { return ::roundf(x); }
inline __device__ float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
inline __device__ float sin(float x) { return ::sinf(x); }
inline __device__ float cos(float x) { return ::cosf(x); }
inline __device__ float max(float a, float b) { return ::fmaxf(a, b); }
inline __device__ float min(float a, float b) { return ::fminf(a, b); }
inline __device__ int max(int a, int b) { return a > b ? a : b; }
inline __device__ int min(int a, int b) { return a < b ? a : b; }
inline __device__ uint max(uint a, uint b) { return a > b ? a : b; }
inline __device__ uint min(uint a, uint b) { return a < b ? a : b; }
inline __device__ float clamp(float x, float a, float b) { return ::fminf(::fmaxf(x, a), b); }
inline __device__ int clamp(int x, int a, int b) { return x < a ? a : (x > b ? b : x); }
inline __device__ bool isinf(float x) { return ::isinf(x); }
inline __device__ bool isnan(float x) { return ::isnan(x); }
namespace precise {
inline __device__ float exp(float x) { return ::expf(x); }
inline __device__ float exp2(float x) { return ::exp2f(x); }
inline __device__ float log(float x) { return ::logf(x); }
inline __device__ float log2(float x) { return ::log2f(x); }
inline __device__ float sqrt(float x) { return ::sqrtf(x); }
inline __device__ float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
inline __device__ float sin(float x) { return ::sinf(x); }
inline __device__ float cos(float x) { return ::cosf(x); }
}  // namespace precise
namespace fast {
inline __device__ float exp(float x) { return __expf(x); }
inline __device__ float exp2(float x) { return ::exp2f(x); }
inline __device__ float log(float x) { return __logf(x); }
}  // namespace fast

template <class To, class From> inline __device__ To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// An 8x8 float matrix over a warp, in the layout of an mma accumulator: lane l has row l / 4,
// columns 2 * (l % 4) and the next. Products run on the tensor cores as three TF32 products of
// high and low parts, which leaves an error near that of float32.
struct pair_ {
  float v[2];
  __device__ float& operator[](int i) { return v[i]; }
  __device__ float operator[](int i) const { return v[i]; }
};
template <class T, int R, int C> struct simdgroup_matrix {
  pair_ e;
  inline __device__ simdgroup_matrix() {}
  inline __device__ explicit simdgroup_matrix(float x) { e[0] = e[1] = x; }
  inline __device__ pair_& thread_elements() { return e; }
};
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;

template <class T, int R, int C> inline __device__ simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(float x) {
  return simdgroup_matrix<T, R, C>(x);
}
struct origin_ { int x, y; };
template <class M, class P>
inline __device__ void simdgroup_load(M& m, const P* p, unsigned long long ld, origin_ at = {0, 0}, bool transpose = false) {
  int l = threadIdx_lane_();
  int r = l >> 2, c = (l & 3) * 2;
  if (transpose) {
    m.e[0] = static_cast<float>(p[(c + at.x) * ld + r + at.y]);
    m.e[1] = static_cast<float>(p[(c + 1 + at.x) * ld + r + at.y]);
  } else {
    m.e[0] = static_cast<float>(p[(r + at.y) * ld + c + at.x]);
    m.e[1] = static_cast<float>(p[(r + at.y) * ld + c + 1 + at.x]);
  }
}
template <class M, class P>
inline __device__ void simdgroup_store(M m, P* p, unsigned long long ld, origin_ at = {0, 0}, bool transpose = false) {
  int l = threadIdx_lane_();
  int r = l >> 2, c = (l & 3) * 2;
  if (transpose) {
    p[(c + at.x) * ld + r + at.y] = static_cast<P>(m.e[0]);
    p[(c + 1 + at.x) * ld + r + at.y] = static_cast<P>(m.e[1]);
  } else {
    p[(r + at.y) * ld + c + at.x] = static_cast<P>(m.e[0]);
    p[(r + at.y) * ld + c + 1 + at.x] = static_cast<P>(m.e[1]);
  }
}
inline __device__ uint tf32_(float x) {
  uint y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
inline __device__ void mma_(float* d, uint a0, uint a2, uint b0, uint b1) {
  // m16n8k8 with the lower eight rows zero; column 2t is k = t and 2t + 1 is k = t + 4.
  float x = 0.0f, y = 0.0f;
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(x), "+f"(y)
      : "r"(a0), "r"(0u), "r"(a2), "r"(0u), "r"(b0), "r"(b1));
}
// Sixteen rows at once, for kernels that hold two tiles one above the other.
#define HYDRA_MMA16 1
inline __device__ void mma16_(float* d, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <class M> inline __device__ void simdgroup_multiply_accumulate(M& d, M a, M b, M c) {
  int l = threadIdx_lane_(), g = l >> 2, t = l & 3, from = 8 * t + (g >> 1);
  float u0 = __shfl_sync(~0u, b.e[0], from), u1 = __shfl_sync(~0u, b.e[1], from);
  float w0 = __shfl_sync(~0u, b.e[0], from + 4), w1 = __shfl_sync(~0u, b.e[1], from + 4);
  float p = g & 1 ? u1 : u0, q = g & 1 ? w1 : w0;
  uint a0 = tf32_(a.e[0]), a2 = tf32_(a.e[1]), b0 = tf32_(p), b1 = tf32_(q);
  uint x0 = tf32_(a.e[0] - __uint_as_float(a0)), x2 = tf32_(a.e[1] - __uint_as_float(a2));
  uint y0 = tf32_(p - __uint_as_float(b0)), y1 = tf32_(q - __uint_as_float(b1));
  float s[2] = {c.e[0], c.e[1]};
  mma_(s, x0, x2, b0, b1);
  mma_(s, a0, a2, y0, y1);
  mma_(s, a0, a2, b0, b1);
  d.e[0] = s[0];
  d.e[1] = s[1];
}
template <class M> inline __device__ void simdgroup_multiply(M& d, M a, M b) {
  simdgroup_multiply_accumulate(d, a, b, M(0.0f));
}
}  // namespace metal
using namespace metal;

HYDRA_FN int frag_row(uint lane) { return lane >> 2; }
HYDRA_FN int frag_col(uint lane) { return (lane & 3) * 2; }

template <int BYTES> struct words_;
template <> struct words_<8> { typedef uint2 type; };
template <> struct words_<16> { typedef uint4 type; };

// n elements of T, aligned to their size, in loads of 16 bytes at most.
template <int N, typename T> HYDRA_FN void load_(const T* p, float* out) {
  constexpr int bytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
  constexpr int each = bytes / sizeof(T);
#pragma unroll
  for (int i = 0; i < N / each; ++i) {
    const typename words_<bytes>::type w = reinterpret_cast<const typename words_<bytes>::type*>(p)[i];
    T x[each];
    memcpy(x, &w, bytes);
#pragma unroll
    for (int j = 0; j < each; ++j) out[i * each + j] = static_cast<float>(x[j]);
  }
}
template <typename T> HYDRA_FN void load4(const T* p, float* out) { load_<4>(p, out); }
template <typename T> HYDRA_FN void load8(const T* p, float* out) { load_<8>(p, out); }
template <typename T> HYDRA_FN void store4(T* p, const float* x) {
  T y[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) y[i] = static_cast<T>(x[i]);
  typename words_<4 * sizeof(T)>::type w;
  memcpy(&w, y, sizeof w);
  *reinterpret_cast<typename words_<4 * sizeof(T)>::type*>(p) = w;
}
HYDRA_FN void load_uint4(const uint* p, uint* out) {
  const uint4 w = *reinterpret_cast<const uint4*>(p);
  out[0] = w.x; out[1] = w.y; out[2] = w.z; out[3] = w.w;
}
