// The operations as the binding calls them: each splits its work into items, gives every thread scratch memory and calls
// the kernels of the instruction set in use. Arguments have been checked.
#pragma once

#include <cstddef>

#include "kernels.h"
#include "matmul.h"

namespace mikv {

void attend(const Attend&, int num_threads);

// Slots of the tier are undefined after an error, but no others.
Status pack(const Pack&, int num_threads);

// Tokens for the next free slots of all rows of the high tier, with their scores and positions.
struct Append {
  Pack rows;                       // `row`, `first_slot` unused; transforms are those of all rows
  Slots book;
  const float* scores;             // (B, G, num_tokens)
  const int64_t* first_positions;  // (B,); a row's tokens follow each other
  int32_t batch;
};
Status append(const Append&, int num_threads);

// Changes nothing that is in use if it returns an error.
Status demote(const Demote&, int num_threads);

// Tokens in `slots` (G, num_tokens) of a row, as float32 (G, num_tokens, D).
struct Unpack {
  Tier tier;
  int32_t row, head_dim, num_kv_heads, num_tokens;
  const int64_t* slots;
  float *keys, *values;
};
void unpack(const Unpack&, int num_threads);

void score_prompt(const ScorePrompt&, int num_threads);

// How a matrix of weights is multiplied by: by table lookup, by byte multiply-adds, or whichever is faster for the rows.
enum MatmulPath : int32_t { kFaster = 0, kTables = 1, kBytes = 2 };
void matmul(const Matmul&, MatmulPath, int num_threads);

// The sum of `bytes` bytes as 64-bit words, read once by all threads together.
uint64_t stream(const void* data, size_t bytes, int num_threads);

// Scratch memory of a call in 64-byte aligned shares. It belongs to the calling thread; unless it is large, it is kept
// from call to call, because touching fresh pages costs more than a small kernel. A thread holds one at a time.
class Scratch {
 public:
  Scratch(size_t share_bytes, int num_shares);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* share(int index) const { return data_ + share_bytes_ * size_t(index); }

 private:
  size_t share_bytes_;
  char* data_;
};

}  // namespace mikv
