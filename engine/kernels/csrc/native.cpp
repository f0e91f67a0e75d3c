// What Python calls: chooses the best instruction set that the processor has, once, and keeps an engine's threads and scratch memory.
#include "operations.h"

namespace segue {
namespace {

// Best first.
std::vector<const Operations*> supported() {
  std::vector<const Operations*> found;
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  if (has_vnni && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512bf16::operations);
  if (has_vnni) found.push_back(&avx512vnni::operations);
  if (has_avx512) found.push_back(&avx512::operations);
  if (has_avx2) found.push_back(&avx2::operations);
#endif
  found.push_back(&portable::operations);
  return found;
}

struct Context {
  const Operations& operations;
  Pool pool;
};

}  // namespace
}  // namespace segue

using segue::Context;


extern "C" {

// Name of the i-th instruction set that this processor has, the best first; null beyond the last.
const char* segue_instruction_set(int64_t index) {
  const auto found = segue::supported();
  return index < static_cast<int64_t>(found.size()) ? found[index]->name : nullptr;
}

// index: see segue_instruction_set.
Context* segue_open(int64_t index, int64_t num_threads) {
  return new Context{*segue::supported().at(index), segue::Pool(static_cast<int>(num_threads))};
}

void segue_close(Context* context) { delete context; }

void segue_linear(Context* context, const segue::Linear* layer, const float* inputs, int64_t num_rows, float* outputs, int64_t is_added) {
  context->operations.linear(context->pool, *layer, inputs, num_rows, outputs, is_added != 0);
}

void segue_rotate_and_write(Context* context, const segue::Cache* cache, int64_t layer, float* heads, const float* qk_norm,
                            const segue::Piece* pieces, int64_t num_pieces) {
  context->operations.rotate_and_write(context->pool, *cache, layer, heads, qk_norm, pieces, num_pieces);
}

void segue_attend(Context* context, const segue::Cache* cache, int64_t layer, const float* heads, float* outputs,
                  const segue::Piece* pieces, int64_t num_pieces) {
  context->operations.attend(context->pool, *cache, layer, heads, outputs, pieces, num_pieces);
}

// All layers, one after the other, on hidden [num_rows][hidden size]. heads, attended and gate_up are what qkv, attention and gate_up give.
void segue_run_layers(Context* context, const segue::Cache* cache, const segue::Layer* layers, int64_t num_layers, float* hidden, int64_t num_rows,
                      float* heads, float* attended, float* gate_up, const segue::Piece* pieces, int64_t num_pieces) {
  auto& [operations, pool] = *context;
  for (int64_t i = 0; i < num_layers; ++i) {
    const segue::Layer& layer = layers[i];
    operations.linear(pool, *layer.qkv, hidden, num_rows, heads, false);
    operations.rotate_and_write(pool, *cache, i, heads, layer.qk_norm, pieces, num_pieces);
    operations.attend(pool, *cache, i, heads, attended, pieces, num_pieces);
    operations.linear(pool, *layer.attention_output, attended, num_rows, hidden, true);
    operations.linear(pool, *layer.gate_up, hidden, num_rows, gate_up, false);
    operations.linear(pool, *layer.down, gate_up, num_rows, hidden, true);
  }
}

}
