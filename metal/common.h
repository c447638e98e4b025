// Helpers of every kernel body. Passed as `header` of mx.fast.metal_kernel, before a kernel's own.
//
// Rules that let one text run as Metal, on the host runtime and, through cuda_shim.h, on CUDA:
//  - helper functions begin with HYDRA_FN; pointers carry their address space;
//  - arithmetic is on float: convert with to_float(x) and from_float<T>(x), never mix types;
//  - no swizzles, no vector constructors, no threadgroup arrays inside helpers;
//  - wide loads through load4, load8, load_uint4; matrix elements through frag_row, frag_col;
//  - scalars the kernel takes are int and are listed in Kernel.scalars.
#ifndef HYDRA_CUDA
#define HYDRA_FN inline
#endif

template <typename T>
HYDRA_FN float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
HYDRA_FN T from_float(float x) {
  return static_cast<T>(x);
}

HYDRA_FN float sigmoid(float x) { return 1.0f / (1.0f + metal::precise::exp(-x)); }

HYDRA_FN float silu(float x) { return x * sigmoid(x); }

// log(1 + exp(x)); where exp(x) is small it keeps its digits, as log1p would.
HYDRA_FN float softplus(float x) {
  const float u = metal::precise::exp(-metal::fabs(x));
  const float w = 1.0f + u;
  const float l = w == 1.0f ? u : metal::precise::log(w) * (u / (w - 1.0f));
  return l + (x > 0.0f ? x : 0.0f);
}

#ifndef HYDRA_CUDA

// Where element 0 of a lane's part of a simdgroup 8x8 matrix is; element 1 is one column on.
HYDRA_FN int frag_row(uint lane) { return static_cast<int>(((lane >> 2) & 4) + ((lane >> 1) & 3)); }
HYDRA_FN int frag_col(uint lane) { return static_cast<int>(((lane >> 2) & 2) * 2 + (lane & 1) * 2); }

// Four neighbours as floats; p is aligned to 4 elements.
template <typename T>
HYDRA_FN void load4(const device T* p, thread float* out) {
  const vec<T, 4> x = *reinterpret_cast<const device vec<T, 4>*>(p);
  for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(x[i]);
}

template <typename T>
HYDRA_FN void load4(const threadgroup T* p, thread float* out) {
  const vec<T, 4> x = *reinterpret_cast<const threadgroup vec<T, 4>*>(p);
  for (int i = 0; i < 4; ++i) out[i] = static_cast<float>(x[i]);
}

template <typename T>
HYDRA_FN void store4(device T* p, const thread float* x) {
  vec<T, 4> y;
  for (int i = 0; i < 4; ++i) y[i] = static_cast<T>(x[i]);
  *reinterpret_cast<device vec<T, 4>*>(p) = y;
}

// Four 32-bit words; p is aligned to 16 bytes.
HYDRA_FN void load_uint4(const device uint* p, thread uint* out) {
  const uint4 x = *reinterpret_cast<const device uint4*>(p);
  for (int i = 0; i < 4; ++i) out[i] = x[i];
}

#endif

// Eight neighbours as floats; p is aligned to 4 elements (on CUDA: to 8, one 16-byte load).
#ifndef HYDRA_CUDA
template <typename T>
HYDRA_FN void load8(const device T* p, thread float* out) {
  load4(p, out);
  load4(p + 4, out + 4);
}
#endif
