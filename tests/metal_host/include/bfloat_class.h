// bfloat as a class, for a compile that only looks for errors: Metal has no implicit conversion from
// float, half or integers to bfloat, which clang's own __bf16 would let pass. Never executed.
#pragma once
#pragma clang system_header

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  template <class T, class = metal::enable_if_t<__is_arithmetic(T) || __is_same(T, half)>>
  explicit constexpr bfloat(T x) : bits((uint16_t)(__builtin_bit_cast(uint32_t, (float)x) >> 16)) {}
  constexpr operator float() const { return __builtin_bit_cast(float, (uint32_t)bits << 16); }
};

namespace mh {
template <int N> struct BfloatVector {
  union {
    bfloat lanes[N];
    struct { bfloat x, y, z, w; };
  };
  constexpr BfloatVector() : lanes{} {}
  constexpr bfloat& operator[](int i) { return lanes[i]; }
  constexpr const bfloat& operator[](int i) const { return lanes[i]; }
};
template <int N> struct Vector<BfloatVector<N>> {
  using element = bfloat;
  static constexpr int size = N;
  static constexpr bool is = true;
};
template <class T, int N> struct VectorOf { typedef T type __attribute__((ext_vector_type(N))); };
template <int N> struct VectorOf<bfloat, N> { typedef BfloatVector<N> type; };
}  // namespace mh
typedef mh::BfloatVector<2> bfloat2;
typedef mh::BfloatVector<3> bfloat3;
typedef mh::BfloatVector<4> bfloat4;
namespace metal {
template <class T, int N> using vec = typename mh::VectorOf<T, N>::type;
}

#define MH_BF(o) \
  constexpr bfloat operator o(bfloat a, bfloat b) { return bfloat((float)a o (float)b); } \
  inline bfloat& operator o##=(bfloat& a, bfloat b) { return a = a o b; } \
  template <int N> mh::BfloatVector<N> operator o(mh::BfloatVector<N> a, mh::BfloatVector<N>) { return a; } \
  template <int N> mh::BfloatVector<N> operator o(mh::BfloatVector<N> a, bfloat) { return a; } \
  template <int N> mh::BfloatVector<N> operator o(bfloat, mh::BfloatVector<N> b) { return b; } \
  template <int N> mh::BfloatVector<N>& operator o##=(mh::BfloatVector<N>& a, mh::BfloatVector<N>) { return a; }
MH_BF(+) MH_BF(-) MH_BF(*) MH_BF(/)
#undef MH_BF
constexpr bfloat operator-(bfloat a) { return bfloat(-(float)a); }
