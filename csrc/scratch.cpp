// How much scratch memory the kernels of pack.inc, score.inc, inputs.inc and bytes.inc ask for, whatever the instruction set.
#include "kernels.h"
#include "matmul.h"

namespace mikv {

size_t pack_scratch_bytes(int32_t head_dim) {
  // a block of 32 tokens as floats, as codes, and as floats that error feedback changes
  return size_t(padded_channels(head_dim)) * kBlockTokens * (sizeof(float) + 1 + sizeof(float));
}

size_t demote_scratch_bytes(int32_t head_dim) { return pack_scratch_bytes(head_dim); }

size_t score_keys_bytes(int32_t num_tokens, int32_t head_dim) {
  return size_t(score_padded_tokens(num_tokens)) * head_dim * sizeof(float);
}

size_t score_scratch_bytes(int32_t num_tokens, int32_t head_dim) {
  const size_t rows = score_tile_rows(num_tokens);
  return rows * (size_t(score_padded_tokens(num_tokens)) + head_dim + kScoreRowNumbers) * sizeof(float);
}

size_t prepare_scratch_bytes(const Matmul& call) {
  return size_t(call.in_features + kChunkColumns) * sizeof(float);  // a row, and zeros up to a whole vector
}

size_t byte_tile_scratch_bytes(const Matmul&, int64_t num_rows) {
  return size_t(kChunkColumns * kColumnInputs * kTileRows + num_rows * kTileRows * int64_t(sizeof(float)));
}

}  // namespace mikv
