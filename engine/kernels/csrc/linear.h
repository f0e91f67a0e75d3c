// Linear layers:  rows → prologue (norm or gate, scales) → quantize → products, panel by panel → scales, bias.
//
// Whatever the number of rows, the sums of one row are formed in one order: over the inputs, in floats; exactly, in integers; exactly
// within a group and over the groups in their order, in int4. So a row's result never depends on its neighbours.

// The rows of one operation, ready to be multiplied.
struct Rows {
  int64_t count;
  int64_t width;   // inputs, filled up with zeros to a multiple of kGroup
  float* floats;            // [count][width], of float formats
  Activation* activations;  // [count][width], of kInt8
  int8_t* bytes;            // [width / kGroup][count][kGroup], of kInt4: a group's rows lie one after the other
  float* scales;            // [count], of kInt8; [width / kGroup][count], of kInt4
  float* totals;            // [width / kGroup][count], of kInt4: sum of the group's inputs
};

inline Rows take_rows(const Linear& layer, int64_t count, Scratch& scratch) {
  Rows rows = {};
  rows.count = count;
  rows.width = round_up(layer.num_inputs, kGroup);
  const int64_t num_groups = rows.width / kGroup;
  auto* memory = static_cast<float*>(scratch.take(count * (rows.width + 2 * num_groups) * sizeof(float)));
  rows.scales = memory;
  rows.totals = memory + count * num_groups;
  rows.floats = memory + 2 * count * num_groups;
  rows.activations = reinterpret_cast<Activation*>(rows.floats);
  rows.bytes = reinterpret_cast<int8_t*>(rows.floats);
  return rows;
}

// One row after norm or gate and input scales: [width]
inline void apply_prologue(const Linear& layer, const float* inputs, float* row) {
  const int64_t n = layer.num_inputs;
  const float* scales = layer.input_scales;
  Floats factor = broadcast(1.0f);
  if (layer.has_norm) {
    Floats squares = broadcast(0.0f);
    for (int64_t k = 0; k < n; k += kLanes) {
      const Floats x = load_some(inputs + k, n - k);
      squares = fma(x, x, squares);
    }
    factor = broadcast(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + layer.norm_eps));
  }
  for (int64_t k = 0; k < n; k += kLanes) {
    Floats x = load_some(inputs + k, n - k);
    if (layer.is_gated) x = silu(x) * load_some(inputs + n + k, n - k);
    if (layer.has_norm) x = x * factor;
    if (scales != nullptr) x = x * load_some(scales + k, n - k);
    store(row + k, x);
  }
  std::memset(row + round_up(n, kLanes), 0, (round_up(n, kGroup) - round_up(n, kLanes)) * sizeof(float));
}

inline void quantize_row_int8(const float* row, const Rows& rows, int64_t index) {
  Floats magnitude = broadcast(0.0f);
  for (int64_t k = 0; k < rows.width; k += kLanes) magnitude = max(magnitude, absolute(load(row + k)));
  const float most = largest(magnitude);
  rows.scales[index] = most / 127.0f;
  const Floats factor = broadcast(quantizing(most));
  Activation* to = rows.activations + index * rows.width;
  for (int64_t k = 0; k < rows.width; k += kLanes) store_activations(to + k, round(load(row + k) * factor));
}

inline void quantize_row_int4(const float* row, const Rows& rows, int64_t index) {
  const int64_t num_groups = rows.width / kGroup;
  for (int64_t group = 0; group < num_groups; ++group) {
    const Floats low = load(row + group * kGroup), high = load(row + group * kGroup + kLanes);
    const float most = largest(max(absolute(low), absolute(high)));
    const Floats factor = broadcast(quantizing(most));
    const Ints low_ints = round(low * factor), high_ints = round(high * factor);
    int8_t* to = rows.bytes + (group * rows.count + index) * kGroup;
    store_int8(to, low_ints);
    store_int8(to + kLanes, high_ints);
    const float scale = most / 127.0f;
    rows.scales[group * rows.count + index] = scale;
    rows.totals[group * rows.count + index] = sum(to_floats(low_ints) + to_floats(high_ints)) * scale;
  }
}

inline void prepare_row(const Linear& layer, const float* inputs, const Rows& rows, int64_t index, Scratch& scratch) {
  const float* from = inputs + index * layer.num_inputs * (layer.is_gated ? 2 : 1);
  if (layer.format == kFloat32 || layer.format == kBfloat16) return apply_prologue(layer, from, rows.floats + index * rows.width);
  auto* row = static_cast<float*>(scratch.take(rows.width * sizeof(float)));
  apply_prologue(layer, from, row);
  layer.format == kInt8 ? quantize_row_int8(row, rows, index) : quantize_row_int4(row, rows, index);
}

// Where a tile's results go.
struct Outputs {
  const Linear& layer;
  float* values;  // [rows][num_outputs]
  bool is_added;

  void put(int64_t row, int64_t first_output, Floats x) const {
    const int64_t count = layer.num_outputs - first_output;
    float* to = values + row * layer.num_outputs + first_output;
    if (layer.bias != nullptr) x = x + load_some(layer.bias + first_output, count);
    if (is_added) x = x + load_some(to, count);
    store_some(to, x, count);
  }
};

// A tile's sums on their way out. Loops over registers do nothing but load and store, so that the compiler unrolls them.
template <int R, int C>
struct Results {
  alignas(64) float values[C][R][kLanes];

  template <class Numbers>
  inline __attribute__((always_inline)) void take(const Numbers (&sums)[R * C]) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      store(values[0][r], to_floats(sums[r]));
      if constexpr (C == 2) store(values[1][r], to_floats(sums[R + r]));
    }
  }
};

// Rows meet the panels `panel` ... panel + C - 1.
template <int C, class Number>
inline void multiply_floats(const Rows& rows, int64_t first_row, int64_t end_row, int64_t panel, const Outputs& out) {
  const int64_t num_inputs = out.layer.num_inputs;
  const Number* weights = static_cast<const Number*>(out.layer.panels) + panel * num_inputs * kLanes;
  with_tiles<kMaxRows>(first_row, end_row, [&](int64_t row, auto num_rows, Share) {
    constexpr int R = num_rows;
    Floats sums[R * C];
    clear<R, C>(sums);
    add_tile<R, C>(sums, rows.floats + row * rows.width, rows.width, weights, kLanes, num_inputs * kLanes, num_inputs);
    Results<R, C> results;
    results.take(sums);
    for (int i = 0; i < R * C; ++i) out.put(row + i % R, (panel + i / R) * kLanes, load(results.values[i / R][i % R]));
  });
}

#if SEGUE_VNNI
template <int R, int C>
inline __attribute__((always_inline)) void add_int8_tile(Ints (&sums)[R * C], const Activation* a, int64_t stride, const int8_t* weights, int64_t num_quads, Ahead ahead) {
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    const int8_t* line = weights + quad * 4 * kLanes;
    const Quads w = load_quads(line), second_w = load_quads(line + (C - 1) * num_quads * 4 * kLanes);
    ahead.fetch<C>(quad);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Quads x = broadcast_quad(a + r * stride + quad * 4);
      add_products(sums[r], w, x);
      if constexpr (C == 2) add_products(sums[R + r], second_w, x);
    }
  }
}
#else
template <int R, int C>
inline __attribute__((always_inline)) void add_int8_tile(Ints (&sums)[R * C], const Activation* a, int64_t stride, const int8_t* weights, int64_t num_quads, Ahead ahead) {
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    ahead.fetch<C>(quad);
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const int8_t* line = weights + (c * num_quads + quad) * 4 * kLanes;
      const Pairs even = even_pairs(line);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) add_products(sums[c * R + r], even, a + r * stride + quad * 4);
      keep_order();
      const Pairs odd = odd_pairs(line);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) add_products(sums[c * R + r], odd, a + r * stride + quad * 4 + 2);
    }
  }
}

// The same with weights that were widened before, which pays when many rows meet them.
template <int R, int C>
inline __attribute__((always_inline)) void add_int8_tile(Ints (&sums)[R * C], const Activation* a, int64_t stride, const int16_t* weights, int64_t num_quads, Ahead) {
  for (int64_t pair = 0; pair < 2 * num_quads; ++pair) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) {
      const Pairs w = load_pairs(weights + (c * num_quads * 2 + pair) * 2 * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) add_products(sums[c * R + r], w, a + r * stride + pair * 2);
    }
  }
}

inline const int16_t* widen(const int8_t* weights, int64_t num_quads, Scratch& scratch) {
  auto* wide = static_cast<int16_t*>(scratch.take(num_quads * 4 * kLanes * sizeof(int16_t)));
  for (int64_t quad = 0; quad < num_quads; ++quad) {
    store_pairs(wide + quad * 4 * kLanes, even_pairs(weights + quad * 4 * kLanes));
    store_pairs(wide + quad * 4 * kLanes + 2 * kLanes, odd_pairs(weights + quad * 4 * kLanes));
  }
  return wide;
}
#endif

// Products of widened numbers need registers of their own.
constexpr int kInt8Rows = kMaxRows == 6 ? 4 : kMaxRows;

// What the sums of a panel begin with.
inline Ints first_sums(const Linear& layer, int64_t first_output) {
  Ints sums = {};
#if SEGUE_VNNI
  // The activations were moved up by 128.
  int32_t lanes[kLanes] = {};
  for (int64_t i = 0; i < std::min<int64_t>(kLanes, layer.num_outputs - first_output); ++i) lanes[i] = -128 * layer.sums[first_output + i];
  sums.v = load_line(lanes);
#endif
  return sums;
}

template <int C, class Weight>
inline void multiply_int8_panels(const Rows& rows, int64_t first_row, int64_t end_row, int64_t panel, const Weight* weights, const Outputs& out) {
  const Linear& layer = out.layer;
  Floats scales[C];
  Ints firsts[C];
  for (int c = 0; c < C; ++c) {
    const int64_t first_output = (panel + c) * kLanes;
    scales[c] = load_some(layer.scales + first_output, layer.num_outputs - first_output);
    firsts[c] = first_sums(layer, first_output);
  }
  const int64_t num_quads = divide_up(layer.num_inputs, 4);
  with_tiles<kInt8Rows>(first_row, end_row, [&](int64_t row, auto num_rows, Share share) {
    constexpr int R = num_rows;
    Ints sums[R * C];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      sums[r] = firsts[0];
      if constexpr (C == 2) sums[R + r] = firsts[1];
    }
    add_int8_tile<R, C>(sums, rows.activations + row * rows.width, rows.width, weights, num_quads,
                        Ahead(weights, C * num_quads * 4 * kLanes, share, num_quads));
    Results<R, C> results;
    results.take(sums);
    for (int i = 0; i < R * C; ++i) {
      const int64_t to = row + i % R;
      out.put(to, (panel + i / R) * kLanes, load(results.values[i / R][i % R]) * broadcast(rows.scales[to]) * scales[i / R]);
    }
  });
}

template <int C>
inline void multiply_int8(const Rows& rows, int64_t first_row, int64_t end_row, int64_t panel, const Outputs& out, Scratch& scratch) {
  const int64_t num_quads = divide_up(out.layer.num_inputs, 4);
  const int8_t* weights = static_cast<const int8_t*>(out.layer.panels) + panel * num_quads * 4 * kLanes;
#if !SEGUE_VNNI
  if (end_row - first_row > 2 * kInt8Rows) {
    return multiply_int8_panels<C>(rows, first_row, end_row, panel, widen(weights, C * num_quads, scratch), out);
  }
#endif
  multiply_int8_panels<C>(rows, first_row, end_row, panel, weights, out);
}

constexpr int kInt4Rows = std::min(kMaxRows, 6);
constexpr int64_t kInt4GroupBytes = kLanes * (2 * sizeof(uint16_t) + kGroup / 2);

// R rows of a tile: sums[r] += the group's products, scaled.
template <int R>
inline __attribute__((always_inline)) void add_int4_group(Floats (&sums)[R], const uint8_t* group, const int8_t* a, const float* scales, const float* totals) {
  const auto* halves = reinterpret_cast<const uint16_t*>(group);
  const uint8_t* nibbles = group + 2 * kLanes * sizeof(uint16_t);
  GroupSums products[R];
#pragma GCC unroll 4
  for (int octet = 0; octet < kGroup / 8; ++octet) {
    const Nibbles low = low_nibbles(nibbles + octet * 4 * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const int8_t* four = a + r * kGroup + octet * 8;
      octet == 0 ? first_products(products[r], low, four) : add_products(products[r], low, four);
    }
    const Nibbles high = high_nibbles(nibbles + octet * 4 * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) add_products(products[r], high, a + r * kGroup + octet * 8 + 4);
  }
  const Floats weight_scales = load_float16(halves), minimums = load_float16(halves + kLanes);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sums[r] = fma(to_floats_of_group(products[r]) * broadcast(scales + r), weight_scales, sums[r]);
    sums[r] = fma(broadcast(totals + r), minimums, sums[r]);
  }
}

inline void multiply_int4(const Rows& rows, int64_t first_row, int64_t end_row, int64_t panel, const Outputs& out) {
  const int64_t num_groups = rows.width / kGroup;
  const uint8_t* groups = static_cast<const uint8_t*>(out.layer.panels) + panel * num_groups * kInt4GroupBytes;
  with_tiles<kInt4Rows>(first_row, end_row, [&](int64_t row, auto num_rows, Share share) {
    constexpr int R = num_rows;
    Floats sums[R];
    clear<R, 1>(sums);
    const Ahead ahead(groups, num_groups * kInt4GroupBytes, share, num_groups);
    for (int64_t group = 0; group < num_groups; ++group) {
      ahead.fetch<kInt4GroupBytes / kLine>(group);
      const int64_t index = group * rows.count + row;
      add_int4_group<R>(sums, groups + group * kInt4GroupBytes, rows.bytes + index * kGroup, rows.scales + index, rows.totals + index);
    }
    Results<R, 1> results;
    results.take(sums);
    for (int r = 0; r < R; ++r) out.put(row + r, panel * kLanes, load(results.values[0][r]));
  });
}

template <int C>
inline void multiply(const Rows& rows, int64_t first_row, int64_t end_row, int64_t panel, const Outputs& out, Scratch& scratch) {
  switch (out.layer.format) {
    case kFloat32: return multiply_floats<C, float>(rows, first_row, end_row, panel, out);
    case kBfloat16: return multiply_floats<C, uint16_t>(rows, first_row, end_row, panel, out);
    case kInt8: return multiply_int8<C>(rows, first_row, end_row, panel, out, scratch);
    default:
      for (int c = 0; c < C; ++c) multiply_int4(rows, first_row, end_row, panel + c, out);
  }
}

// Panels that are multiplied at once: each of a row's numbers is then loaded once for all of them.
constexpr int kPanels = kMaxSums / kMaxRows;
// Rows that meet panels before the next ones are taken: their activations stay in the second-level cache.
constexpr int64_t kRowBlock = 16 * kMaxRows;

inline void linear(Pool& pool, const Linear& layer, const float* inputs, int64_t num_rows, float* outputs, bool is_added) {
  const Rows rows = take_rows(layer, num_rows, pool.shared);
  const int64_t num_parts = std::min<int64_t>(num_rows, pool.num_threads());
  pool.run(num_parts, [&](int64_t part, Scratch& scratch) {
    for (int64_t row = num_rows * part / num_parts; row < num_rows * (part + 1) / num_parts; ++row) {
      prepare_row(layer, inputs, rows, row, scratch);
    }
  });
  const Outputs out = {layer, outputs, is_added};
  const int64_t num_panels = divide_up(layer.num_outputs, kLanes);
  const int64_t num_shares = std::min<int64_t>(num_panels, pool.num_threads());
  pool.run(num_shares, [&](int64_t share, Scratch& scratch) {
    const int64_t end_panel = num_panels * (share + 1) / num_shares;
    for (int64_t row = 0; row < num_rows; row += kRowBlock) {
      const int64_t end_row = std::min(row + kRowBlock, num_rows);
      int64_t panel = num_panels * share / num_shares;
      for (; panel + kPanels <= end_panel; panel += kPanels) multiply<kPanels>(rows, row, end_row, panel, out, scratch);
      for (; panel < end_panel; ++panel) multiply<1>(rows, row, end_row, panel, out, scratch);
    }
  });
}
