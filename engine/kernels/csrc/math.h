// Functions of sixteen lanes, in terms of the vector headers' operations.

// 2 to the power of x <= 127; exactly 1 at 0, 0 below -126.5. The nearest whole power and a polynomial over the rest (minimax, its error
// 9e-8), within 2 units in the last place.
inline Floats exponential2(Floats x) {
  x = max(x, broadcast(-127.0f));
  const Ints n = round(x);
  const Floats r = x - to_floats(n);
  Floats p = broadcast(1.326472731e-3f);
  p = fma(p, r, broadcast(9.671512991e-3f));
  p = fma(p, r, broadcast(5.550733581e-2f));
  p = fma(p, r, broadcast(2.402224243e-1f));
  p = fma(p, r, broadcast(6.931470037e-1f));
  return fma(p, r, broadcast(1.0f)) * power_of_two(n);
}

inline Floats to_floats(Floats x) { return x; }

constexpr float kLog2E = 1.44269504f;

// x * sigmoid(x)
inline Floats silu(Floats x) {
  return x / (broadcast(1.0f) + exponential2(min(x * broadcast(-kLog2E), broadcast(127.0f))));
}

// Up to sixteen numbers; lanes from `count` on are 0.
inline Floats load_some(const float* p, int64_t count) {
  if (count >= kLanes) return load(p);
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}
inline void store_some(float* p, Floats x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  float lanes[kLanes];
  store(lanes, x);
  std::memcpy(p, lanes, count * sizeof(float));
}

// The same of a KV format's numbers.
template <class Number>
inline Floats load_numbers(const Number* p, int64_t count) {
  if (count >= kLanes) return load(p);
  Number some[kLanes] = {};
  std::memcpy(some, p, count * sizeof(Number));
  return load(some);
}

// The compiler moves nothing across: fewer values wait in registers at a time.
inline void keep_order() { asm volatile("" ::: "memory"); }

constexpr int64_t kLine = 64;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch(const void* p, int64_t num_bytes) {
  for (int64_t offset = 0; offset < num_bytes; offset += kLine) prefetch(static_cast<const char*>(p) + offset);
}

// Part `index` of `count`.
struct Share {
  int64_t index;
  int64_t count;
};

// Weights come from memory, once a step. While tiles of rows meet some, they ask for the next ones, which lie behind them: each tile for its
// share, a little with each of its steps, so that memory never rests while there is arithmetic to do.
class Ahead {
 public:
  Ahead(const void* weights, int64_t num_bytes, Share tile, int64_t num_steps)
      : from_(static_cast<const char*>(weights) + num_bytes + num_bytes * tile.index / tile.count), step_(num_bytes / (tile.count * num_steps)) {}

  template <int Lines>
  void fetch(int64_t step) const {
    for (int line = 0; line < Lines; ++line) prefetch(from_ + step * step_ + line * kLine);
  }

 private:
  const char* from_;
  int64_t step_;
};

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t y) { return divide_up(x, y) * y; }

// The factor that brings the largest magnitude to 127.
inline float quantizing(float largest_magnitude) { return largest_magnitude > 0 ? 127.0f / largest_magnitude : 0.0f; }

// Sums of products of R rows with C times 16 outputs each, over `count` inputs in their order:
// sums[c * R + r] += a[r * a_stride + k] * b[k * b_stride + c * c_stride ...], whatever R and C are.
template <int R, int C, class Number>
inline __attribute__((always_inline)) void add_tile(Floats (&sums)[R * C], const float* a, int64_t a_stride, const Number* b, int64_t b_stride, int64_t c_stride, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if constexpr (C == 1) {
      const Floats w = load(b + k * b_stride);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) sums[r] = fma(broadcast(a + r * a_stride + k), w, sums[r]);
    } else {
      add_columns<R>(sums, a + k, a_stride, b + k * b_stride, c_stride);
    }
  }
}

// Products of bfloat16 numbers enter a float32 sum in pairs, the second of a pair first, each rounded once: as VDPBF16PS does it. That
// instruction takes denormals for zero, so for the same bits everywhere all of attention does.
#if SEGUE_BF16
using Half = uint16_t;
using WideHalf = uint32_t;  // a pair, the first number in its low half
inline void store_halves(Half* p, Floats x) { store_bfloat16(p, x); }
inline void widen_halves(const uint16_t* from, int64_t num_rows, int64_t width, WideHalf* to, int64_t stride) {
  for (int64_t row = 0; row < num_rows; row += 2, to += stride) {
    const uint16_t* first = from + row * width;
    const int64_t second_width = row + 1 < num_rows ? width : 0;
    int64_t column = 0;
    for (; column + kLanes <= second_width; column += kLanes) store_pairs(to + column, pair(load_halves(first + column), load_halves(first + width + column)));
    for (; column < width; column += kLanes) {
      store_pairs(to + column, pair(load_halves(first + column, width - column), load_halves(first + width + column, std::max<int64_t>(0, second_width - column))));
    }
  }
}
// sums[c * R + r] += a[r * a_stride + k] * b[k][c * 16 ...] over `count` numbers k, an even number of them in a
template <int R, int C>
inline __attribute__((always_inline)) void add_pair_tile(Floats (&sums)[R * C], const Half* a, int64_t a_stride, const WideHalf* b, int64_t b_stride, int64_t count) {
  for (int64_t k = 0; k < count; k += 2, b += b_stride) {
    const Pairs first = load_pairs(b), second = load_pairs(b + (C - 1) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Pairs x = broadcast_pair(a + r * a_stride + k);
      sums[r] = add_pair_products(sums[r], x, first);
      if constexpr (C == 2) sums[R + r] = add_pair_products(sums[R + r], x, second);
    }
  }
}
template <int R, int C>
inline __attribute__((always_inline)) void add_pair_tile(Floats (&sums)[R * C], const Half* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int64_t count) {
  for (int64_t k = 0; k < count; k += 2, b += 2 * b_stride) {
    const int64_t has_second = k + 1 < count ? kLanes : 0;
    const Pairs first = pair(load_halves(b), load_halves(b + b_stride, has_second));
    const uint16_t* more = b + (C - 1) * kLanes;
    const Pairs second = pair(load_halves(more), load_halves(more + b_stride, has_second));
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Pairs x = broadcast_pair(a + r * a_stride + k);
      sums[r] = add_pair_products(sums[r], x, first);
      if constexpr (C == 2) sums[R + r] = add_pair_products(sums[R + r], x, second);
    }
  }
}
#else
using Half = float;  // whose lower 16 bits are 0
using WideHalf = float;
inline void store_halves(Half* p, Floats x) { store(p, to_bfloat16(x)); }
inline void widen_halves(const uint16_t* from, int64_t num_rows, int64_t width, WideHalf* to, int64_t stride) {
  for (int64_t row = 0; row < num_rows; ++row, to += stride) {
    for (int64_t column = 0; column < width; column += kLanes) store(to + column, load_numbers(from + row * width + column, width - column));
  }
}
// sums[c * R + r] += a[r * a_stride + k] * b[k * b_stride + c * 16 ...] over `count` numbers k
template <int R, int C, class Source>
inline __attribute__((always_inline)) void add_pair_tile(Floats (&sums)[R * C], const Half* a, int64_t a_stride, const Source* b, int64_t b_stride, int64_t count) {
  for (int64_t k = 0; k < count; k += 2) {
    if (k + 1 < count) add_tile<R, C>(sums, a + k + 1, a_stride, b + (k + 1) * b_stride, b_stride, kLanes, 1);
    add_tile<R, C>(sums, a + k, a_stride, b + k * b_stride, b_stride, kLanes, 1);
  }
}
#endif

template <int R, int C>
inline __attribute__((always_inline)) void clear(Floats (&sums)[R * C]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sums[r] = broadcast(0.0f);
    if constexpr (C == 2) sums[R + r] = broadcast(0.0f);
  }
}

// Calls work with num_rows, which is 1 ... kMaxRows, as a constant of the compiler's.
template <int R = kMaxRows, class Work>
inline void with_rows(int num_rows, Work&& work) {
  if constexpr (R > 1) {
    if (num_rows < R) return with_rows<R - 1>(num_rows, work);
  }
  work(std::integral_constant<int, R>());
}

// Calls work(row, R, share) for tiles of R rows, a constant of the compiler's, from first_row to end_row: of equal size, but for the last ones.
template <int Most, class Work>
inline void with_tiles(int64_t first_row, int64_t end_row, Work&& work) {
  const int64_t count = divide_up(end_row - first_row, Most), size = divide_up(end_row - first_row, count);
  for (int64_t row = first_row; row < end_row; row += size) {
    const Share share = {(row - first_row) / size, count};
    with_rows<Most>(static_cast<int>(std::min(size, end_row - row)), [&](auto num_rows) { work(row, num_rows, share); });
  }
}
