// What Python (engine/kernels/native.py) and the kernels agree on. Plain structs, filled through ctypes, the same on every instruction set.
#pragma once

#include <cstdint>

namespace segue {

// Output channels that are computed together; weights lie in panels of as many. The lanes of every vector in these kernels.
constexpr int kLanes = 16;
// Inputs that share a scale and a minimum in int4 weights.
constexpr int kGroup = 32;

enum Format : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };

// outputs = weight * prologue(inputs) + bias. The last panel is filled up with zeros.
struct Linear {
  // Float:  [panel][input][16 outputs]
  // kInt8:  [panel][input / 4][16 outputs][4 inputs], inputs filled up to a multiple of 4 with zeros
  // kInt4:  [panel][group] { float16 scales[16], float16 minimums[16], uint8[4][16 outputs][4] }, where byte i of octet o holds
  //         input 8 * o + i of the group in its low half and input 8 * o + 4 + i in its high half
  const void* panels;
  const float* scales;        // kInt8: [outputs]
  const int32_t* sums;        // kInt8: sum of each output's weights
  const float* bias;          // [outputs] or null
  const float* input_scales;  // [inputs] or null: the norm's weight, what smoothing took out of the inputs, or their product
  int32_t format;
  int32_t num_inputs;
  int32_t num_outputs;
  int32_t is_gated;  // inputs come as [rows, 2 * num_inputs]: silu(gate) * value enters
  int32_t has_norm;  // inputs are scaled to a root mean square of 1
  float norm_eps;
};

// A decoder layer's linear layers, and the norm of its query and key heads [num_heads + num_kv_heads][head_dim], or null.
struct Layer {
  const Linear* qkv;
  const Linear* attention_output;
  const Linear* gate_up;
  const Linear* down;
  const float* qk_norm;
};

// The KV cache of a model and the heads that use it; memory as in segue/kv_layout.py.
struct Cache {
  uint8_t* memory;
  const float* rotary;  // [positions][head_dim]: head_dim / 2 cosines, then as many sines
  int64_t layer_bytes;
  int64_t slab_bytes;
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t block_size;
  int32_t format;  // kFloat32, kBfloat16 or kInt8
  float norm_eps;
};

// Rows first_row ... are tokens start ... end - 1 of one context, whose KV lies in `blocks`.
struct Piece {
  const int32_t* blocks;
  int64_t first_row;
  int64_t start;
  int64_t end;
};

}  // namespace segue
