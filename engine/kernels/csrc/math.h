// Functions of sixteen lanes, in terms of the vector headers' operations.

// e to the power of x; exactly 1 at 0. Range reduction to |r| <= ln 2 / 2 and a polynomial (Cephes), within 2 units in the last place.
inline Floats exponential(Floats x) {
  x = max(min(x, broadcast(88.0f)), broadcast(-87.0f));
  const Ints n = round(x * broadcast(1.44269504f));
  const Floats whole = to_floats(n);
  Floats r = fma(whole, broadcast(-0.693359375f), x);
  r = fma(whole, broadcast(2.12194440e-4f), r);
  Floats p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  return fma(p, r * r, r + broadcast(1.0f)) * power_of_two(n);
}

// x * sigmoid(x)
inline Floats silu(Floats x) { return x / (broadcast(1.0f) + exponential(broadcast(0.0f) - x)); }

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

// The compiler moves nothing across: fewer values wait in registers at a time.
inline void keep_order() { asm volatile("" ::: "memory"); }

// Weights and KV come from memory, once a step: each line is asked for this many bytes before it is needed. Reading on alone, the
// processor's own prefetching stops at each page.
constexpr int64_t kAhead = 1536;
constexpr int64_t kLine = 64;
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
inline void prefetch(const void* p, int64_t num_bytes) {
  for (int64_t offset = 0; offset < num_bytes; offset += kLine) prefetch(static_cast<const char*>(p) + offset);
}

inline int64_t divide_up(int64_t x, int64_t y) { return (x + y - 1) / y; }
inline int64_t round_up(int64_t x, int64_t y) { return divide_up(x, y) * y; }

// The factor that brings the largest magnitude to 127.
inline float quantizing(float largest_magnitude) { return largest_magnitude > 0 ? 127.0f / largest_magnitude : 0.0f; }

// Sums of products of R rows with 16 outputs each, over `count` inputs in their order:
// sums[r] += a[r * a_stride + k] * b[k * b_stride ...], whatever R is. `load_b` turns b's numbers into floats.
template <int R, class Number, class Load>
inline void add_tile(Floats (&sums)[R], const float* a, int64_t a_stride, const Number* b, int64_t b_stride, int64_t count, Load load_b) {
  for (int64_t k = 0; k < count; ++k) {
    const Floats w = load_b(b + k * b_stride);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[r] = fma(broadcast(a + r * a_stride + k), w, sums[r]);
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
