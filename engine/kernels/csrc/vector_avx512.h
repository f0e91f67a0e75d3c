// Sixteen lanes in one 512-bit register: AVX-512 F, BW, DQ, VL; with SEGUE_VNNI its int8 dot products too, with SEGUE_BF16 those of bfloat16.
#include <immintrin.h>

constexpr int kMaxRows = 12;
constexpr int kMaxSums = 24;

struct Floats { __m512 v; };
struct Ints { __m512i v; };

inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
inline Floats operator+(Floats x, Floats y) { return {_mm512_add_ps(x.v, y.v)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm512_sub_ps(x.v, y.v)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm512_mul_ps(x.v, y.v)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm512_div_ps(x.v, y.v)}; }
inline Floats max(Floats x, Floats y) { return {_mm512_max_ps(x.v, y.v)}; }
inline Floats min(Floats x, Floats y) { return {_mm512_min_ps(x.v, y.v)}; }
// x * y + z, rounded once
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm512_fmadd_ps(x.v, y.v, z.v)}; }
inline Floats absolute(Floats x) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), x.v)}; }
// Lanes below `count` from x, the others from y.
inline Floats first(int count, Floats x, Floats y) {
  const __mmask16 mask = count <= 0 ? 0 : count >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
  return {_mm512_mask_blend_ps(mask, y.v, x.v)};
}
// Lane i joins lane i + 8, then i + 4, i + 2, i + 1.
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// To the nearest, ties to even.
inline Ints round(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }
inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
// 2 to the power of x, -126 ... 127; 0 for -127
inline Floats power_of_two(Ints x) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(x.v, _mm512_set1_epi32(127)), 23))};
}

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m512i load_line(const void* p) { return _mm512_loadu_si512(p); }
// bfloat16
inline Floats load(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_bytes(p)), 16))};
}
inline Floats load_float16(const uint16_t* p) { return {_mm512_cvtph_ps(load_bytes(p))}; }
inline Floats load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
// sums[c * R + r] += a[r * a_stride] * sixteen numbers from p + c * c_stride
template <int R, class Number>
inline __attribute__((always_inline)) void add_columns(Floats (&sums)[2 * R], const float* a, int64_t a_stride, const Number* p, int64_t c_stride) {
  const Floats first = load(p), second = load(p + c_stride);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    const Floats x = broadcast(a + r * a_stride);
    sums[r] = fma(x, first, sums[r]);
    sums[R + r] = fma(x, second, sums[R + r]);
  }
}
// Lanes -128 ... 127 as 16 bytes
inline void store_int8(int8_t* p, Ints x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v)); }

// sum + products, in the register of sum: written with intrinsics, once a tile fills the registers, the compiler (GCC 12) keeps them in
// memory.
#if SEGUE_VNNI
inline __m512i plus_products(__m512i sum, __m512i bytes, __m512i signed_bytes) {
#if SEGUE_EMULATED
  return _mm512_dpbusd_epi32(sum, bytes, signed_bytes);
#else
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
  return sum;
#endif
}
#endif
#if SEGUE_BF16
inline __m512 plus_products(__m512 sum, __m512i pairs, __m512i others) {
#if SEGUE_EMULATED
  return _mm512_dpbf16_ps(sum, pairs, others);
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(others));
  return sum;
#endif
}
#endif

#if SEGUE_BF16
// Sixteen pairs of bfloat16 numbers, the first of each in the low half.
struct Pairs { __m512i v; };
// Sixteen numbers, or up to sixteen, as the low halves of lanes; lanes from `count` on are 0.
inline __m512i load_halves(const uint16_t* p) { return _mm512_cvtepu16_epi32(load_bytes(p)); }
inline __m512i load_halves(const uint16_t* p, int64_t count) {
  if (count >= kLanes) return load_halves(p);
  uint16_t some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(uint16_t));
  return load_halves(some);
}
inline Pairs pair(__m512i first, __m512i second) { return {_mm512_or_si512(first, _mm512_slli_epi32(second, 16))}; }
inline Pairs load_pairs(const uint32_t* p) { return {load_line(p)}; }
inline void store_pairs(uint32_t* p, Pairs x) { _mm512_storeu_si512(p, x.v); }
inline Pairs broadcast_pair(const uint16_t* p) {
  int32_t both;
  std::memcpy(&both, p, 4);
  return {_mm512_set1_epi32(both)};
}
inline Floats add_pair_products(Floats sum, Pairs x, Pairs y) { return {plus_products(sum.v, x.v, y.v)}; }
inline void store_bfloat16(uint16_t* p, Floats x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v)));
}
#else
// Rounded to bfloat16, ties to even.
inline Floats to_bfloat16(Floats x) {
  const __m512i bits = _mm512_castps_si512(x.v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  return {_mm512_castsi512_ps(_mm512_and_si512(rounded, _mm512_set1_epi32(0xFFFF0000)))};
}
#endif

#if SEGUE_VNNI
// int8 products with VNNI: four at a time, activations moved up by 128 to make them unsigned.
using Activation = uint8_t;
inline void store_activations(Activation* p, Ints x) {
  const __m128i bytes = _mm512_cvtepi32_epi8(x.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
}
struct Quads { __m512i v; };
inline Quads load_quads(const int8_t* p) { return {load_line(p)}; }
inline Quads broadcast_quad(const Activation* four) {
  int32_t all;
  std::memcpy(&all, four, 4);
  return {_mm512_set1_epi32(all)};
}
inline void add_products(Ints& sum, Quads w, Quads activations) { sum.v = plus_products(sum.v, activations.v, w.v); }
#else
// int8 products without VNNI: widened to 16 bits and multiplied in pairs; see vector_avx2.h.
using Activation = int16_t;
struct Pairs { __m512i v; };
inline void store_activations(Activation* p, Ints x) {
  const __m256i swap = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(_mm512_cvtepi32_epi16(x.v), swap));
}
inline Pairs load_pairs(const int16_t* p) { return {load_line(p)}; }
inline void store_pairs(int16_t* p, Pairs x) { _mm512_storeu_si512(p, x.v); }
inline Pairs even_pairs(const int8_t* p) { return {_mm512_srai_epi16(_mm512_slli_epi16(load_line(p), 8), 8)}; }
inline Pairs odd_pairs(const int8_t* p) { return {_mm512_srai_epi16(load_line(p), 8)}; }
inline void add_products(Ints& sum, Pairs w, const Activation* pair) {
  int32_t both;
  std::memcpy(&both, pair, 4);
  sum.v = _mm512_add_epi32(sum.v, _mm512_madd_epi16(w.v, _mm512_set1_epi32(both)));
}
#endif

// int4 products: within a group, eight times two products of at most 15 * 127 fit 16 bits.
struct Nibbles { __m512i v; };  // 16 outputs x 4 inputs, unsigned bytes
struct GroupSums { __m512i v; };
inline Nibbles low_nibbles(const uint8_t* p) { return {_mm512_and_si512(load_line(p), _mm512_set1_epi8(15))}; }
inline Nibbles high_nibbles(const uint8_t* p) {
  return {_mm512_and_si512(_mm512_srli_epi16(load_line(p), 4), _mm512_set1_epi8(15))};
}
inline void add_products(GroupSums& sum, Nibbles w, const int8_t* four) {
  int32_t all;
  std::memcpy(&all, four, 4);
#if SEGUE_VNNI
  sum.v = _mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(all));
#else
  sum.v = _mm512_add_epi16(sum.v, _mm512_maddubs_epi16(w.v, _mm512_set1_epi32(all)));
#endif
}
inline void first_products(GroupSums& sum, Nibbles w, const int8_t* four) {
  sum = GroupSums{};
  add_products(sum, w, four);
}
inline Floats to_floats_of_group(GroupSums x) {
#if SEGUE_VNNI
  return {_mm512_cvtepi32_ps(x.v)};
#else
  return {_mm512_cvtepi32_ps(_mm512_madd_epi16(x.v, _mm512_set1_epi16(1)))};
#endif
}
