// Sixteen lanes in plain arrays, for every other processor; the compiler makes of them what it can.

constexpr int kMaxRows = 4;
constexpr int kMaxSums = 4;

struct Floats { float v[kLanes]; };
struct Ints { int32_t v[kLanes]; };

template <class Result, class Lane>
inline Result each_lane(Lane lane) {
  Result x;
  for (int i = 0; i < kLanes; ++i) x.v[i] = lane(i);
  return x;
}

inline Floats load(const float* p) { return each_lane<Floats>([=](int i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats broadcast(float x) { return each_lane<Floats>([=](int) { return x; }); }
inline Floats broadcast(const float* p) { return broadcast(*p); }
inline Floats operator+(Floats x, Floats y) { return each_lane<Floats>([&](int i) { return x.v[i] + y.v[i]; }); }
inline Floats operator-(Floats x, Floats y) { return each_lane<Floats>([&](int i) { return x.v[i] - y.v[i]; }); }
inline Floats operator*(Floats x, Floats y) { return each_lane<Floats>([&](int i) { return x.v[i] * y.v[i]; }); }
inline Floats operator/(Floats x, Floats y) { return each_lane<Floats>([&](int i) { return x.v[i] / y.v[i]; }); }
inline Floats max(Floats x, Floats y) { return each_lane<Floats>([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline Floats min(Floats x, Floats y) { return each_lane<Floats>([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
// x * y + z, rounded once where the processor can do that, else twice: emulating it would be far too slow.
inline Floats fma(Floats x, Floats y, Floats z) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return each_lane<Floats>([&](int i) { return __builtin_fmaf(x.v[i], y.v[i], z.v[i]); });
#else
  return each_lane<Floats>([&](int i) { return x.v[i] * y.v[i] + z.v[i]; });
#endif
}
inline Floats absolute(Floats x) { return each_lane<Floats>([&](int i) { return __builtin_fabsf(x.v[i]); }); }
// Lanes below `count` from x, the others from y.
inline Floats first(int count, Floats x, Floats y) { return each_lane<Floats>([&](int i) { return i < count ? x.v[i] : y.v[i]; }); }
// Lane i joins lane i + 8, then i + 4, i + 2, i + 1.
template <class Join>
inline float reduce(Floats x, Join join) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.v[i] = join(x.v[i], x.v[i + half]);
  }
  return x.v[0];
}
inline float sum(Floats x) { return reduce(x, [](float p, float q) { return p + q; }); }
inline float largest(Floats x) { return reduce(x, [](float p, float q) { return p > q ? p : q; }); }

// To the nearest, ties to even: adding 1.5 * 2^23 leaves the integer in the low bits. |x| < 2^22.
inline Ints round(Floats x) {
  return each_lane<Ints>([&](int i) {
    const float shifted = x.v[i] + 12582912.0f;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    return bits - 0x4B400000;
  });
}
inline Floats to_floats(Ints x) { return each_lane<Floats>([&](int i) { return static_cast<float>(x.v[i]); }); }
inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// 2 to the power of x, -126 ... 127; 0 for -127
inline Floats power_of_two(Ints x) {
  return each_lane<Floats>([&](int i) { return from_bits(static_cast<uint32_t>(x.v[i] + 127) << 23); });
}

// bfloat16
inline Floats load(const uint16_t* p) {
  return each_lane<Floats>([=](int i) { return from_bits(static_cast<uint32_t>(p[i]) << 16); });
}
// Shifting exponent and mantissa into place leaves the exponent's bias wrong by 112, which one product mends, subnormals included.
inline Floats load_float16(const uint16_t* p) {
  return each_lane<Floats>([=](int i) {
    const float size = from_bits(static_cast<uint32_t>(p[i] & 0x7FFF) << 13) * 0x1p112f;
    return p[i] & 0x8000 ? -size : size;
  });
}
inline Floats load(const int8_t* p) { return each_lane<Floats>([=](int i) { return static_cast<float>(p[i]); }); }
// Rounded to bfloat16, ties to even.
inline Floats to_bfloat16(Floats x) {
  return each_lane<Floats>([&](int i) {
    uint32_t bits;
    std::memcpy(&bits, &x.v[i], 4);
    return from_bits((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000);
  });
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
inline void store_int8(int8_t* p, Ints x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}

// int8 products in pairs of 16-bit numbers; see vector_avx2.h.
using Activation = int16_t;
struct Pairs { int16_t v[2 * kLanes]; };
inline void store_activations(Activation* p, Ints x) {
  for (int i = 0; i < kLanes; i += 4) {
    p[i] = static_cast<int16_t>(x.v[i]);
    p[i + 1] = static_cast<int16_t>(x.v[i + 2]);
    p[i + 2] = static_cast<int16_t>(x.v[i + 1]);
    p[i + 3] = static_cast<int16_t>(x.v[i + 3]);
  }
}
inline Pairs load_pairs(const int16_t* p) {
  Pairs x;
  std::memcpy(x.v, p, sizeof x.v);
  return x;
}
inline void store_pairs(int16_t* p, Pairs x) { std::memcpy(p, x.v, sizeof x.v); }
template <class Byte>
inline Pairs every_second(const Byte* p, int shift, int mask) {
  Pairs x;
  for (int i = 0; i < 2 * kLanes; ++i) x.v[i] = static_cast<int16_t>((p[2 * i] >> shift) & mask);
  return x;
}
inline Pairs even_pairs(const int8_t* p) { return every_second(p, 0, -1); }
inline Pairs odd_pairs(const int8_t* p) { return every_second(p + 1, 0, -1); }
inline void add_products(Ints& sum, Pairs w, const Activation* pair) {
  for (int i = 0; i < kLanes; ++i) sum.v[i] += w.v[2 * i] * pair[0] + w.v[2 * i + 1] * pair[1];
}

struct Nibbles { uint8_t v[4 * kLanes]; };  // 16 outputs x 4 inputs
using GroupSums = Ints;
inline Nibbles low_nibbles(const uint8_t* p) {
  Nibbles x;
  for (int i = 0; i < 4 * kLanes; ++i) x.v[i] = p[i] & 15;
  return x;
}
inline Nibbles high_nibbles(const uint8_t* p) {
  Nibbles x;
  for (int i = 0; i < 4 * kLanes; ++i) x.v[i] = p[i] >> 4;
  return x;
}
inline void add_products(GroupSums& sum, Nibbles w, const int8_t* four) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < 4; ++j) sum.v[i] += w.v[4 * i + j] * four[j];
  }
}
inline void first_products(GroupSums& sum, Nibbles w, const int8_t* four) {
  sum = GroupSums{};
  add_products(sum, w, four);
}
inline Floats to_floats_of_group(GroupSums x) { return to_floats(x); }
