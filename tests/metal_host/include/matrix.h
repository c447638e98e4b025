// simdgroup_matrix: 8 x 8, two neighbouring elements of a row in each lane, in Apple's layout.
#pragma once
#pragma clang system_header
#include "simd.h"

namespace mh {
MH_INLINE constexpr u32 matrix_row(u32 lane) { return (lane / 4 & 4) + (lane / 2 & 3); }
MH_INLINE constexpr u32 matrix_column(u32 lane) { return (lane / 4 & 2) * 2 + (lane & 1) * 2; }

// slots hold A, B and C as three row-major float[64]; results get A * B + C.
static MH_RUNTIME void combine_multiply(Group& g, u32 parity, u32) {
  typedef float Row __attribute__((ext_vector_type(8)));
  const float* a = (const float*)g.slots[parity];
  const Row* b = (const Row*)(a + 64);
  const Row* c = (const Row*)(a + 128);
  Row* d = (Row*)g.results[parity];
  for (int i = 0; i < 8; ++i) {
    Row sum = c[i];
    for (int k = 0; k < 8; ++k) sum = __builtin_elementwise_fma((Row)a[8 * i + k], b[k], sum);
    d[i] = sum;
  }
}
struct Pair { float first, second; };
static MH_RUNTIME Pair multiply(Pair a, Pair b, Pair c, u64 tag) {
  Fiber* me = mh_current;
  u32 parity = me->group->parity, at = matrix_row(me->lane) * 8 + matrix_column(me->lane);
  float* slots = (float*)me->group->slots[parity] + at;
  __builtin_memcpy(slots, &a, sizeof a);
  __builtin_memcpy(slots + 64, &b, sizeof b);
  __builtin_memcpy(slots + 128, &c, sizeof c);
  mh_wait(tag, &combine_multiply);
  Pair d;
  __builtin_memcpy(&d, (float*)me->group->results[parity] + at, sizeof d);
  return d;
}
// Loads and stores exchange nothing: lanes meet only in watched builds, to find divergence.
MH_INLINE void converge(Op op, u64 tag) {
#if MH_WATCHED
  (void)op;
  mh_wait(tag, nullptr);
#else
  (void)tag;
  mh_op_counts[op] += lane() == 0;
#endif
}
}  // namespace mh

namespace metal {
template <class T, int R = 8, int C = 8> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8 simdgroup_matrix exists");
  static_assert(is_floating_point_v<T>, "simdgroup_matrix holds float, half or bfloat");
  using storage_type = vec<T, 2>;
  storage_type elements_;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    uint lane = mh::lane(), row = mh::matrix_row(lane), column = mh::matrix_column(lane);
    elements_[0] = row == column ? diagonal : T(0);
    elements_[1] = row == column + 1 ? diagonal : T(0);
  }
  storage_type& thread_elements() { return elements_; }
  const storage_type& thread_elements() const { return elements_; }
};
typedef simdgroup_matrix<float> simdgroup_float8x8;
typedef simdgroup_matrix<half> simdgroup_half8x8;
typedef simdgroup_matrix<bfloat> simdgroup_bfloat8x8;

template <class T, int R, int C = R> MH_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.elements_[0] = value;
  m.elements_[1] = value;
  return m;
}
#define MH_MATRIX_INDEX(e) \
  (transpose ? (origin.y + column + e) * stride + origin.x + row : (origin.y + row) * stride + origin.x + column + e)
#define MH_MATRIX_MEMORY(SPACE) \
  template <class T> MH_INLINE void simdgroup_load( \
      simdgroup_matrix<T>& m, const SPACE T* p, ulong stride = 8, ulong2 origin = ulong2{0, 0}, \
      bool transpose = false, MH_AT) { \
    mh::converge(mh::OP_simdgroup_load, at_.tag(mh::OP_simdgroup_load)); \
    ulong row = mh::matrix_row(mh::lane()), column = mh::matrix_column(mh::lane()); \
    m.elements_[0] = p[MH_MATRIX_INDEX(0)]; \
    m.elements_[1] = p[MH_MATRIX_INDEX(1)]; \
  } \
  template <class T> MH_INLINE void simdgroup_store( \
      simdgroup_matrix<T> m, SPACE T* p, ulong stride = 8, ulong2 origin = ulong2{0, 0}, \
      bool transpose = false, MH_AT) { \
    mh::converge(mh::OP_simdgroup_store, at_.tag(mh::OP_simdgroup_store)); \
    ulong row = mh::matrix_row(mh::lane()), column = mh::matrix_column(mh::lane()); \
    p[MH_MATRIX_INDEX(0)] = m.elements_[0]; \
    p[MH_MATRIX_INDEX(1)] = m.elements_[1]; \
  }
MH_MATRIX_MEMORY(device)
#if !MH_BFLOAT_CLASS
MH_MATRIX_MEMORY(threadgroup)
#endif

template <class D, class A, class B, class C> MH_INLINE void simdgroup_multiply_accumulate(
    simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, simdgroup_matrix<C> c, MH_AT) {
  mh::Pair r = mh::multiply(
      {(float)a.elements_[0], (float)a.elements_[1]}, {(float)b.elements_[0], (float)b.elements_[1]},
      {(float)c.elements_[0], (float)c.elements_[1]}, at_.tag(mh::OP_simdgroup_multiply));
  d.elements_[0] = (D)r.first;
  d.elements_[1] = (D)r.second;
}
template <class D, class A, class B> MH_INLINE void simdgroup_multiply(
    simdgroup_matrix<D>& d, simdgroup_matrix<A> a, simdgroup_matrix<B> b, MH_AT) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<D, 8>(D(0)), at_);
}
}  // namespace metal
