// Rotary embedding, the writing of K and V, and attention over the paged cache, which is never gathered.
//
// A query row meets its context block by block, from the first to the last, with an online softmax (Milakov and Gimelshein 2018). Which
// other rows share its tile makes no difference: positions that it may not see have weight 0 and change no sum.
//
// With KV of bfloat16, queries and weights are rounded to bfloat16 too and multiplied in pairs (math.h), as matrix instructions do.

inline uint8_t* slab_of(const Cache& cache, int64_t layer, int32_t block, bool is_value, int64_t head) {
  const int64_t slab = (static_cast<int64_t>(block) * 2 + is_value) * cache.num_kv_heads + head;
  return cache.memory + layer * cache.layer_bytes + slab * cache.slab_bytes;
}

inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 64);  // stays a NaN
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// One token's K (stride block_size) or V (stride 1) into its slab.
inline void write_token(const Cache& cache, uint8_t* slab, const float* head, int64_t first, int64_t stride, int64_t offset) {
  const int64_t n = cache.head_dim;
  if (cache.format == kFloat32) {
    auto* to = reinterpret_cast<float*>(slab) + first;
    for (int64_t d = 0; d < n; ++d) to[d * stride] = head[d];
  } else if (cache.format == kBfloat16) {
    auto* to = reinterpret_cast<uint16_t*>(slab) + first;
    for (int64_t d = 0; d < n; ++d) to[d * stride] = to_bfloat16(head[d]);
  } else {
    float most = 0;
    for (int64_t d = 0; d < n; ++d) most = std::max(most, __builtin_fabsf(head[d]));
    auto* to = reinterpret_cast<int8_t*>(slab) + first;
    const float factor = quantizing(most);
    for (int64_t d = 0; d < n; ++d) to[d * stride] = static_cast<int8_t>(__builtin_rintf(head[d] * factor));
    const float scale = most / 127.0f;
    std::memcpy(slab + n * cache.block_size + offset * sizeof(float), &scale, sizeof scale);
  }
}

inline void normalize_head(const Cache& cache, float* head, const float* weight) {
  Floats squares = broadcast(0.0f);
  for (int64_t d = 0; d < cache.head_dim; d += kLanes) {
    const Floats x = load_some(head + d, cache.head_dim - d);
    squares = fma(x, x, squares);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(cache.head_dim) + cache.norm_eps);
  for (int64_t d = 0; d < cache.head_dim; ++d) head[d] = head[d] * factor * weight[d];
}

// Pairs (d, d + head_dim / 2) are turned by the position's angles.
inline void rotate_head(const Cache& cache, float* head, int64_t position) {
  const int64_t half = cache.head_dim / 2;
  const float* cosines = cache.rotary + position * cache.head_dim;
  const float* sines = cosines + half;
  for (int64_t d = 0; d < half; ++d) {
    const float x = head[d], y = head[d + half];
    head[d] = x * cosines[d] - y * sines[d];
    head[d + half] = y * cosines[d] + x * sines[d];
  }
}

inline void rotate_and_write(Pool& pool, const Cache& cache, int64_t layer, float* heads, const float* qk_norm, const Piece* pieces, int64_t num_pieces) {
  const int64_t num_rotated = cache.num_heads + cache.num_kv_heads, row_width = (num_rotated + cache.num_kv_heads) * cache.head_dim;
  pool.run(num_pieces, [&](int64_t index, Scratch&) {
    const Piece& piece = pieces[index];
    for (int64_t position = piece.start; position < piece.end; ++position) {
      float* row = heads + (piece.first_row + position - piece.start) * row_width;
      for (int64_t head = 0; head < num_rotated; ++head) {
        float* values = row + head * cache.head_dim;
        if (qk_norm != nullptr) normalize_head(cache, values, qk_norm + head * cache.head_dim);
        rotate_head(cache, values, position);
      }
      const int64_t offset = position % cache.block_size;
      const int32_t block = piece.blocks[position / cache.block_size];
      for (int64_t head = 0; head < cache.num_kv_heads; ++head) {
        const float* key = row + (cache.num_heads + head) * cache.head_dim;
        const float* value = row + (num_rotated + head) * cache.head_dim;
        write_token(cache, slab_of(cache, layer, block, false, head), key, offset, cache.block_size, offset);
        write_token(cache, slab_of(cache, layer, block, true, head), value, offset * cache.head_dim, 1, offset);
      }
    }
  });
}

// How KV of a format is multiplied: `Operand` is a query's or a weight's number, `Wide` one of keys or values that were prepared for many
// rows, Wide[rows][stride] of them or half as many rows of pairs.
template <class Number>
struct Products {
  using Operand = float;
  using Wide = float;
  static void store_operands(float* p, Floats x) { store(p, x); }
  static void widen(const Number* from, int64_t num_rows, int64_t width, float* to, int64_t stride) {
    for (int64_t row = 0; row < num_rows; ++row) {
      for (int64_t column = 0; column < width; column += kLanes) {
        store(to + row * stride + column, load_numbers(from + row * width + column, width - column));
      }
    }
  }
  template <int R, int C, class Source>
  static inline __attribute__((always_inline)) void add(Floats (&sums)[R * C], const float* a, int64_t a_stride, const Source* b, int64_t b_stride, int64_t count) {
    add_tile<R, C>(sums, a, a_stride, b, b_stride, kLanes, count);
  }
};
template <>
struct Products<uint16_t> {
  using Operand = Half;
  using Wide = WideHalf;
  static void store_operands(Half* p, Floats x) { store_halves(p, x); }
  static void widen(const uint16_t* from, int64_t num_rows, int64_t width, WideHalf* to, int64_t stride) { widen_halves(from, num_rows, width, to, stride); }
  template <int R, int C, class Source>
  static inline __attribute__((always_inline)) void add(Floats (&sums)[R * C], const Half* a, int64_t a_stride, const Source* b, int64_t b_stride, int64_t count) {
    add_pair_tile<R, C>(sums, a, a_stride, b, b_stride, count);
  }
};

// One block of one head: keys [head_dim][key_stride], values [positions][value_stride]. Scales, one for each position, are int8's.
template <class Source>
struct Block {
  const Source* keys;
  const Source* values;
  int64_t key_stride;
  int64_t value_stride;
  const float* key_scales;
  const float* value_scales;
  // Slabs of the block after it, to be fetched while this one is used; null where that would not help.
  const uint8_t* next_keys;
  const uint8_t* next_values;
};

// What a task works in. Strides are multiples of kLanes.
template <class Number>
struct Tile {
  using Operand = typename Products<Number>::Operand;
  using Wide = typename Products<Number>::Wide;
  int64_t key_stride;
  int64_t value_stride;
  Operand* queries;  // [rows][value_stride], scaled: their scores are powers of 2
  float* outputs;    // [rows][value_stride], not yet divided by the weights' sum
  float* scores;     // [kMaxRows][key_stride]
  Operand* weights;  // [kMaxRows][key_stride]
  float* sums;       // [rows][kLanes]: of the weights so far, lane by lane
  float* highest;    // [rows]: largest score so far
  Wide* keys;        // [head_dim][key_stride]
  Wide* values;      // [block_size][value_stride]

  Tile(const Cache& cache, int64_t num_rows, Scratch& scratch) {
    key_stride = round_up(cache.block_size, kLanes);
    value_stride = round_up(cache.head_dim, kLanes);
    // All begin at a line of the cache.
    int64_t offset = 0;
    const auto place = [&](int64_t count, size_t size) {
      const int64_t begin = offset;
      offset += round_up(count * size, kLine);
      return begin;
    };
    const int64_t offsets[] = {place(num_rows * value_stride, sizeof(Operand)), place(num_rows * value_stride, sizeof(float)),
                               place(kMaxRows * key_stride, sizeof(float)),     place(kMaxRows * key_stride, sizeof(Operand)),
                               place(num_rows * kLanes, sizeof(float)),         place(round_up(num_rows, kLanes), sizeof(float)),
                               place(cache.head_dim * key_stride, sizeof(Wide)), place(cache.block_size * value_stride, sizeof(Wide))};
    auto* memory = static_cast<uint8_t*>(scratch.take(offset));
    queries = reinterpret_cast<Operand*>(memory + offsets[0]);
    outputs = reinterpret_cast<float*>(memory + offsets[1]);
    scores = reinterpret_cast<float*>(memory + offsets[2]);
    weights = reinterpret_cast<Operand*>(memory + offsets[3]);
    sums = reinterpret_cast<float*>(memory + offsets[4]);
    highest = reinterpret_cast<float*>(memory + offsets[5]);
    keys = reinterpret_cast<Wide*>(memory + offsets[6]);
    values = reinterpret_cast<Wide*>(memory + offsets[7]);
  }
};

// The largest of `highest` and a row's scores. Only `visible` positions count: the others' scores become -infinity.
inline float find_highest(float* scores, int64_t visible, int64_t num_columns, float highest) {
  for (int64_t p = visible / kLanes * kLanes; p < num_columns; p += kLanes) {
    store(scores + p, first(static_cast<int>(visible - p), load(scores + p), broadcast(-__builtin_inff())));
  }
  Floats most = broadcast(highest);
  for (int64_t p = 0; p < num_columns; p += kLanes) most = max(most, load(scores + p));
  return largest(most);
}

// A row's scores become weights, 2^(score - highest), which the scales of the values enter. Returns the sum of those without, lane by lane.
template <class Number>
inline Floats weigh(const float* scores, int64_t num_columns, float highest, const float* scales, int64_t num_scales, typename Tile<Number>::Operand* weights) {
  Floats sums = broadcast(0.0f);
  for (int64_t p = 0; p < num_columns; p += kLanes) {
    Floats each = exponential2(load(scores + p) - broadcast(highest));
    sums = sums + each;
    if (scales) each = each * load_some(scales + p, num_scales - p);
    Products<Number>::store_operands(weights + p, each);
  }
  return sums;
}

// R rows, of which the first is `row` of its task and `place` of the tile, meet C times 16 columns of a block's keys.
template <class Number, int R, int C, class Source>
inline void score_columns(const Cache& cache, const Tile<Number>& tile, int64_t row, int64_t place, const Block<Source>& block, int64_t column) {
  Floats scores[R * C];
  clear<R, C>(scores);
  Products<Number>::template add<R, C>(scores, tile.queries + row * tile.value_stride, tile.value_stride, block.keys + column, block.key_stride, cache.head_dim);
  float* to = tile.scores + place * tile.key_stride + column;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(to + r * tile.key_stride, scores[r]);
    if constexpr (C == 2) store(to + r * tile.key_stride + kLanes, scores[R + r]);
  }
  for (int64_t p = column; block.key_scales && p < column + C * kLanes; p += kLanes) {
    const Floats scales = load_some(block.key_scales + p, cache.block_size - p);
    for (int r = 0; r < R; ++r) store(to + r * tile.key_stride + p - column, load(to + r * tile.key_stride + p - column) * scales);
  }
}

// R rows' outputs, scaled by the rows' factors, take in C times 16 columns of a block's values.
template <class Number, int R, int C, class Source>
inline void add_values(const Tile<Number>& tile, int64_t row, int64_t place, const Block<Source>& block, int64_t column, int64_t positions, const float* factors) {
  float* outputs = tile.outputs + row * tile.value_stride + column;
  Floats sums[R * C];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sums[r] = load(outputs + r * tile.value_stride) * broadcast(factors[place + r]);
    if constexpr (C == 2) sums[R + r] = load(outputs + r * tile.value_stride + kLanes) * broadcast(factors[place + r]);
  }
  Products<Number>::template add<R, C>(sums, tile.weights + place * tile.key_stride, tile.key_stride, block.values + column, block.value_stride, positions);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(outputs + r * tile.value_stride, sums[r]);
    if constexpr (C == 2) store(outputs + r * tile.value_stride + kLanes, sums[R + r]);
  }
}

// Calls work(column, C) for C times 16 columns after the other: as many at a time as keep the processor busy with R rows.
template <int R, class Work>
inline void with_columns(int64_t num_columns, Work&& work) {
  constexpr int C = 2 * R <= kMaxSums ? 2 : 1;
  int64_t column = 0;
  for (; column + C * kLanes <= num_columns; column += C * kLanes) work(column, std::integral_constant<int, C>());
  if (column < num_columns) work(column, std::integral_constant<int, 1>());
}

// Rows `row` ... of a task as a tile, `num_rows` of each of the blocks, which are those of several K heads at the same positions, meet the
// first `positions` of them; the tile's row r sees visible[r].
template <class Number, class Source>
inline void attend_tile(const Cache& cache, const Tile<Number>& tile, int64_t row, int num_rows, const Block<Source>* blocks, int num_blocks,
                        const int64_t* visible, int64_t positions) {
  const int64_t num_columns = round_up(positions, kLanes);
  const auto fetch = [&](const uint8_t* next, int64_t column, int64_t end, int64_t num_columns) {
    if (next) prefetch(next + cache.slab_bytes * column / end, cache.slab_bytes * num_columns / end);
  };
  // Calls work(block, place, R) for each block and its rows, which begin at `place` of the tile.
  const auto with_blocks = [&](auto&& work) {
    with_rows(num_rows, [&](auto count) {
      for (int i = 0; i < num_blocks; ++i) work(blocks[i], i * num_rows, count);
    });
  };
  with_blocks([&](const Block<Source>& block, int64_t place, auto count) {
    constexpr int R = count;
    with_columns<R>(num_columns, [&](int64_t column, auto columns) {
      fetch(block.next_keys, column, tile.key_stride, columns * kLanes);
      score_columns<Number, R, decltype(columns)::value>(cache, tile, row + place, place, block, column);
    });
  });
  float changes[kLanes] = {}, factors[kLanes];
  for (int r = 0; r < num_rows * num_blocks; ++r) {
    float& highest = tile.highest[row + r];
    const float before = highest;
    highest = find_highest(tile.scores + r * tile.key_stride, std::max<int64_t>(0, visible[r]), num_columns, before);
    changes[r] = before - highest;  // -infinity before the first block, whose sums and outputs are 0
  }
  store(factors, exponential2(load(changes)));
  for (int r = 0; r < num_rows * num_blocks; ++r) {
    const Floats more = weigh<Number>(tile.scores + r * tile.key_stride, num_columns, tile.highest[row + r], blocks[r / num_rows].value_scales,
                                      cache.block_size, tile.weights + r * tile.key_stride);
    float* sums = tile.sums + (row + r) * kLanes;
    store(sums, fma(load(sums), broadcast(factors[r]), more));
  }
  with_blocks([&](const Block<Source>& block, int64_t place, auto count) {
    constexpr int R = count;
    with_columns<R>(tile.value_stride, [&](int64_t column, auto columns) {
      fetch(block.next_values, column, tile.value_stride, columns * kLanes);
      add_values<Number, R, decltype(columns)::value>(tile, row + place, place, block, column, positions, factors);
    });
  });
}

// Consecutive tokens of a piece, or one token, with the query heads that share one K head, or K heads first_head ... end_head - 1.
struct Task {
  const Piece* piece;
  int64_t first_position;
  int64_t num_tokens;
  int64_t first_head;
  int64_t end_head;
};

// The rows of one K head meet a block that starts at position `start` and of which `filled` positions are written, tile by tile.
template <class Number, class Source>
inline void attend_rows(const Cache& cache, const Tile<Number>& tile, const Task& task, const Block<Source>& block, int64_t start, int64_t filled) {
  const int64_t group = cache.num_heads / cache.num_kv_heads, num_rows = task.num_tokens * group;
  for (int64_t row = 0; row < num_rows; row += kMaxRows) {
    const int64_t count = std::min<int64_t>(kMaxRows, num_rows - row);
    int64_t visible[kMaxRows], most = 0;
    for (int64_t r = 0; r < count; ++r) {
      visible[r] = std::min(filled, task.first_position + (row + r) / group + 1 - start);
      most = std::max(most, visible[r]);
    }
    if (most > 0) attend_tile(cache, tile, row, static_cast<int>(count), &block, 1, visible, most);
  }
}

// A vector holds numbers of one row of keys or values alone.
inline bool fills_vectors(const Cache& cache) { return cache.block_size % kLanes == 0 && cache.head_dim % kLanes == 0; }

// A head of a context's block, and for tasks of few rows the one of the block after it, if there is one.
template <class Number>
inline Block<Number> find_block(const Cache& cache, int64_t layer, const int32_t* id, int64_t head, bool has_next) {
  Block<Number> block = {};
  block.keys = reinterpret_cast<const Number*>(slab_of(cache, layer, *id, false, head));
  block.values = reinterpret_cast<const Number*>(slab_of(cache, layer, *id, true, head));
  block.key_stride = cache.block_size;
  block.value_stride = cache.head_dim;
  if constexpr (std::is_same_v<Number, int8_t>) {
    const int64_t num_numbers = static_cast<int64_t>(cache.head_dim) * cache.block_size;
    block.key_scales = reinterpret_cast<const float*>(block.keys + num_numbers);
    block.value_scales = reinterpret_cast<const float*>(block.values + num_numbers);
  }
  if (has_next) {
    block.next_keys = slab_of(cache, layer, id[1], false, head);
    block.next_values = slab_of(cache, layer, id[1], true, head);
  }
  return block;
}

template <class Number>
inline void attend_blocks(const Cache& cache, int64_t layer, const Task& task, const Tile<Number>& tile) {
  const int64_t group = cache.num_heads / cache.num_kv_heads, num_heads = task.end_head - task.first_head;
  const bool is_few_rows = task.num_tokens * group <= kMaxRows;
  // Numbers that many rows meet are prepared once.
  const bool is_read_in_place = fills_vectors(cache) && (std::is_same_v<Number, float> || is_few_rows);
  const int64_t end = task.first_position + task.num_tokens;
  for (int64_t start = 0; start < end; start += cache.block_size) {
    const int64_t filled = std::min<int64_t>(cache.block_size, end - start);
    const int32_t* id = task.piece->blocks + start / cache.block_size;
    const bool has_next = is_few_rows && start + cache.block_size < end;
    if (num_heads > 1) {
      Block<Number> blocks[kMaxRows];
      int64_t visible[kMaxRows];
      for (int64_t i = 0; i < num_heads; ++i) blocks[i] = find_block<Number>(cache, layer, id, task.first_head + i, has_next);
      for (int64_t& each : visible) each = filled;
      attend_tile(cache, tile, 0, static_cast<int>(group), blocks, static_cast<int>(num_heads), visible, filled);
      continue;
    }
    const Block<Number> block = find_block<Number>(cache, layer, id, task.first_head, has_next);
    if (is_read_in_place) {
      attend_rows(cache, tile, task, block, start, filled);
    } else {
      Products<Number>::widen(block.keys, cache.head_dim, cache.block_size, tile.keys, tile.key_stride);
      Products<Number>::widen(block.values, filled, cache.head_dim, tile.values, tile.value_stride);
      const Block<typename Tile<Number>::Wide> wide = {tile.keys,        tile.values,        tile.key_stride, tile.value_stride,
                                                       block.key_scales, block.value_scales, block.next_keys, block.next_values};
      attend_rows(cache, tile, task, wide, start, filled);
    }
  }
}

template <class Number>
inline void attend_task(const Cache& cache, int64_t layer, const Task& task, const float* heads, float* outputs, Scratch& scratch) {
  const int64_t group = cache.num_heads / cache.num_kv_heads, num_rows = task.num_tokens * group * (task.end_head - task.first_head);
  const int64_t row_width = (cache.num_heads + 2 * cache.num_kv_heads) * cache.head_dim, output_width = cache.num_heads * cache.head_dim;
  const int64_t first_token = task.piece->first_row + task.first_position - task.piece->start;
  const Tile<Number> tile(cache, num_rows, scratch);
  // Rows are sorted by K head, then by token, then by query head. Where a row's head begins in its token's heads:
  const auto place = [&](int64_t row) {
    const int64_t head = task.first_head + row / (task.num_tokens * group), token = row / group % task.num_tokens;
    return std::pair(first_token + token, (head * group + row % group) * cache.head_dim);
  };
  const Floats scale = broadcast(kLog2E / __builtin_sqrtf(static_cast<float>(cache.head_dim)));
  std::memset(tile.outputs, 0, num_rows * tile.value_stride * sizeof(float));
  std::memset(tile.sums, 0, num_rows * kLanes * sizeof(float));
  for (int64_t row = 0; row < num_rows; ++row) {
    const auto [token, first] = place(row);
    const float* query = heads + token * row_width + first;
    for (int64_t d = 0; d < cache.head_dim; d += kLanes) {
      Products<Number>::store_operands(tile.queries + row * tile.value_stride + d, load_some(query + d, cache.head_dim - d) * scale);
    }
    tile.highest[row] = -__builtin_inff();
  }
  attend_blocks<Number>(cache, layer, task, tile);
  for (int64_t row = 0; row < num_rows; ++row) {
    const auto [token, first] = place(row);
    float* to = outputs + token * output_width + first;
    const Floats total = broadcast(sum(load(tile.sums + row * kLanes)));
    for (int64_t d = 0; d < cache.head_dim; d += kLanes) {
      store_some(to + d, load(tile.outputs + row * tile.value_stride + d) / total, cache.head_dim - d);
    }
  }
}

// Query rows of one task: they share each block that was made floats, and fit the first-level cache with it.
constexpr int64_t kTaskRows = 48;

inline void attend(Pool& pool, const Cache& cache, int64_t layer, const float* heads, float* outputs, const Piece* pieces, int64_t num_pieces) {
  const int64_t group = cache.num_heads / cache.num_kv_heads, tokens = std::max<int64_t>(1, kTaskRows / group);
  // K heads that a single token's task takes: memory gives most when it is read in the order in which it lies.
  const int64_t heads_at_once = fills_vectors(cache) && num_pieces >= pool.num_threads() ? std::max<int64_t>(1, kMaxRows / group) : 1;
  std::vector<Task> tasks;
  for (const Piece* piece = pieces; piece != pieces + num_pieces; ++piece) {
    const int64_t num_heads = piece->end - piece->start == 1 ? heads_at_once : 1;
    // Tasks start at multiples of `tokens`, the last ones, which see most, first.
    for (int64_t start = (piece->end - 1) / tokens * tokens; start + tokens > piece->start; start -= tokens) {
      const int64_t from = std::max(start, piece->start), to = std::min(start + tokens, piece->end);
      for (int64_t head = 0; head < cache.num_kv_heads; head += num_heads) {
        tasks.push_back({piece, from, to - from, head, std::min<int64_t>(head + num_heads, cache.num_kv_heads)});
      }
    }
  }
  pool.run(static_cast<int64_t>(tasks.size()), [&](int64_t index, Scratch& scratch) {
    const FlushDenormals flush;
    switch (cache.format) {
      case kFloat32: return attend_task<float>(cache, layer, tasks[index], heads, outputs, scratch);
      case kBfloat16: return attend_task<uint16_t>(cache, layer, tasks[index], heads, outputs, scratch);
      default: return attend_task<int8_t>(cache, layer, tasks[index], heads, outputs, scratch);
    }
  });
}
