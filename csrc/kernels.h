// The contract between the kernels of one instruction set and everything else: plain structs and function pointers.
//
// Kernels know pointers and sizes. They allocate nothing, throw nothing and start no threads; the caller has checked
// every size, and gives scratch memory. B batch, H query heads, G KV heads, R = H / G, Tq queries, D head dim.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"
#include "scratch.h"

namespace mikv {

// How the numbers of keys or values are written; the values are those of `mikv.ops.schema.Numbers`.
enum Numbers : int32_t {
  kFloat32 = 0,   // data (32, D)
  kFloat16 = 1,
  kBfloat16 = 2,
  kLloydMax = 3,  // codes, scale f16 (1, 32): x = scale * level[code]; 8 bits: level = code - 127.5
  kUniform = 4,   // codes, scale f16 (1, 32): x = scale * (code - (2^bits - 1) / 2)
  kGroup = 5,     // codes, scale and zero f16 (D / group_size, 32): x = scale * code + zero
  kChannel = 6,   // codes, scale and zero f16 (1, D): x = scale * code + zero, keys only
};

struct Format {
  Numbers numbers;
  int32_t bits;        // of a code; unused by floats
  int32_t group_size;  // channels that share scale and zero, kGroup only
};

// Whether keys can be rounded with error feedback.
static inline bool takes_feedback(const Format& format) {
  return (format.numbers == kLloydMax || format.numbers == kUniform) && format.bits != 8;
}

// A tensor (pages, G, blocks, ...) whose last axes are contiguous; strides in bytes.
struct Part {
  char* data;
  int64_t page_stride, head_stride, block_stride;
};

struct Side {
  Format format;
  Part codes, scale, zero;  // floats use codes only, as their data; symmetric grids have no zero
};

// Tokens of every row in blocks of 32, reached through a table of pages: block i of row b is block
// i % blocks_per_page of page pages[b * pages_per_row + i / blocks_per_page].
struct Tier {
  Side keys, values;
  const int32_t* pages;
  int64_t pages_per_row, blocks_per_page;
  const int64_t* counts;  // tokens of each row
  int32_t is_transformed;
};

// A block's page and its place there; and what a part holds of that block.
struct Place {
  int64_t page, block;
};
static inline Place place_of(const Tier& tier, int64_t row, int64_t block) {
  if (tier.pages_per_row == 1) return {tier.pages[row], block};  // spares a slow division
  return {tier.pages[row * tier.pages_per_row + block / tier.blocks_per_page], block % tier.blocks_per_page};
}
static inline char* at(const Part& part, const Place& place, int64_t head) {
  return part.data + place.page * part.page_stride + head * part.head_stride + place.block * part.block_stride;
}
static inline char* block_address(const Tier& tier, const Part& part, int64_t row, int64_t head, int64_t block) {
  return at(part, place_of(tier, row, block), head);
}

// Bookkeeping of the high tier, addressed like its other parts: float32 (32,) and int32 (32,) per block.
struct Slots {
  Part score, position;
};

// Channel vectors (B, G, D) float16, or null; see mikv.transforms.
struct Transform {
  const uint16_t* center;
  const uint16_t* balancer;  // keys only
  int32_t hadamard_size;     // 1: no rotation
};

// Floats (B, heads, T, D) with contiguous channels; strides in elements.
struct Tokens {
  const void* data;
  Numbers numbers;  // kFloat32, kFloat16 or kBfloat16
  int64_t batch_stride, head_stride, token_stride;
};

// One call of attention, as the caller states it.
struct Attend {
  int32_t batch, num_kv_heads, group, num_queries, head_dim, num_new;
  Tokens queries, new_keys, new_values;
  const uint8_t* mask;  // (B, Tq, num_new) of bool, or null: query t sees new tokens up to num_new - num_queries + t
  int64_t mask_batch_stride, mask_query_stride;
  Tier tiers[2];
  int32_t num_tiers;
  Transform key_transform, value_transform;
  float scale, softcap;       // softcap 0: none
  const float* sinks;         // (H,) or null
  const float* query_weight;  // (B, Tq) or null: how much a query counts in `received`
  int32_t exact;              // float arithmetic throughout
  void* output;               // (B, H, Tq, D) contiguous, of the numbers of queries
  float* received[2];         // per tier (B, G, capacity) float32 contiguous, written whole, or null
  int64_t received_stride[2]; // its capacity
  float* received_new;        // (B, G, num_new) or null
};

// Whether numbers could be stored.
enum Status : int32_t {
  kStored = 0,
  kNotFinite = 1,  // NaN or Inf among them
  kOverflow = 2,   // a number, scale or zero-point is beyond the range of 16-bit floats
};

// Tokens to be stored in a row of a tier: slots first_slot + 0 .. num_tokens - 1 of head g take the tokens of head g.
struct Pack {
  int32_t row, head_dim, num_kv_heads, num_tokens;
  int64_t first_slot;
  Tokens keys, values;                      // batch_stride unused
  Transform key_transform, value_transform; // of this row, (G, D); applied only if the tier is transformed
  Tier tier;
  const float* key_feedback;                // of this row, (G, D, D), or null; see takes_feedback
};

// Tokens that leave the high tier of a row: slots (G, count), ascending. They are appended to the low tier as new blocks,
// count then being a multiple of 32, or dropped; the last slots of the high tier fill the holes.
struct Demote {
  int32_t row, head_dim, num_kv_heads, count;
  const int64_t* slots;
  Transform key_transform, value_transform;  // of this row; applied if only the low tier is transformed
  Tier high, low;
  Slots book;
  int32_t drop;
  const float* key_feedback;  // of this row, (G, D, D), or null; for the keys of the low tier
};

// Attention that T keys receive from Tq queries, those of every `stride`-th token, the last of which is the last token.
struct ScorePrompt {
  int32_t batch, num_kv_heads, group, num_queries, num_tokens, head_dim, stride;
  int32_t distance;  // a query counts for tokens at least so many columns before it; 0: for all that it sees
  Tokens queries, keys;
  const uint8_t* mask;  // (B, Tq, T) of bool, or null: causal
  int64_t mask_batch_stride, mask_query_stride;
  float scale, softcap;
  const float* sinks;         // (H,) or null
  const float* query_weight;  // (B, Tq) or null
  float* received;            // (B, G, T)
};

// Every num_shares-th tile of queries of one KV head. Of one head: score_keys for all tokens, then score_share for all
// shares, then score_join.
struct ScoreShare {
  int32_t row, head, share, num_shares;
  const float* keys;  // of score_keys
  float* received;    // (T,) of this share, written whole
  char* scratch;
};

// What one instruction set provides. Items are independent of each other; `scratch` is 64-byte aligned.
struct Kernels {
  const char* isa;
  // attention of the queries [first_query, first_query + num_queries) to a share of the tokens of one KV head
  void (*attend_share)(const Attend&, const struct AttendShare&);
  // joins the shares of one KV head, writes the output and adds to `received`
  void (*attend_join)(const Attend&, const struct AttendJoin&);
  // stores the tokens [first_token, first_token + num_tokens) of one head; different blocks are independent
  Status (*pack)(const Pack&, int32_t head, int32_t first_token, int32_t num_tokens, char* scratch);
  // writes the low blocks of a demotion (nothing if dropped); the high tier is as it was, so an error harms nothing
  Status (*demote)(const Demote&, int32_t head, char* scratch);
  // fills the holes that a demotion leaves in the high tier
  void (*fill_holes)(const Demote&, int32_t head);
  // decode tokens of one head: slots (num_tokens,) of row -> keys, values float32 (num_tokens, D)
  void (*unpack)(const Tier&, int32_t row, int32_t head, int32_t head_dim, const int64_t* slots, int32_t num_tokens,
                 float* keys, float* values);
  // arranges the keys [first_token, first_token + num_tokens) of one head for score_share; first_token % 64 == 0
  void (*score_keys)(const ScorePrompt&, int32_t row, int32_t head, int32_t first_token, int32_t num_tokens,
                     float* keys);
  void (*score_share)(const ScorePrompt&, const ScoreShare&);
  // adds up the shares (num_shares, T) of one head
  void (*score_join)(const ScorePrompt&, int32_t row, int32_t head, int32_t num_shares, const float* shares);
  // rows of inputs, rounded to tables or bytes: one of `rows`; a tile of 64 output rows from them, see matmul.h
  void (*prepare_tables)(const struct Matmul&, const struct MatmulRows& rows, int64_t index, char* scratch);
  void (*prepare_bytes)(const Matmul&, const MatmulRows& rows, int64_t index, char* scratch);
  void (*lut_tile)(const Matmul&, const MatmulRows& rows, int64_t tile);
  void (*byte_tile)(const Matmul&, const MatmulRows& rows, int64_t tile, int64_t first_row, int64_t num_rows,
                    char* scratch);
  int64_t most_lut_rows;  // of inputs, for which tables are faster than bytes
  // the sum of `bytes` bytes as 64-bit words: the speed at which memory can be read
  uint64_t (*stream)(const void* data, size_t bytes);
};

// One share: rows are (query head of the group, query) pairs, head-major.
struct AttendShare {
  int32_t row, head;                  // of the batch; KV head
  int32_t first_query, num_queries;   // of Tq: rows = group * num_queries
  int64_t first_block[2], stop_block[2];  // per tier
  int32_t with_new;                   // whether this share has the new tokens
  char* scratch;
  float* maximum;      // (rows,)
  float* total;        // (rows,) sum of exp(logit - maximum)
  float* mass;         // (rows,) the transformed tokens' part of total
  float* plain;        // (rows, padded D) weighted values as they are
  float* transformed;  // (rows, padded D) weighted values in the transformed basis
  float* logits[2];    // per tier that wants `received`: (rows, logits_stride[i]) by slot, or null
  int64_t logits_stride[2];
  float* logits_new;   // (rows, num_new) or null
};

struct AttendJoin {
  int32_t row, head, first_query, num_queries, num_shares;
  char* scratch;
  // as in AttendShare, share s at offset s * rows (* padded D)
  const float *maximum, *total, *mass, *plain, *transformed;
  float* logits[2];
  int64_t logits_stride[2];
  float* logits_new;
};

// Scratch bytes that the functions above need.
size_t attend_scratch_bytes(int32_t rows, int32_t head_dim);
size_t pack_scratch_bytes(int32_t head_dim);
size_t demote_scratch_bytes(int32_t head_dim);
size_t score_keys_bytes(int32_t num_tokens, int32_t head_dim);     // 64-byte aligned, of one head
size_t score_scratch_bytes(int32_t num_tokens, int32_t head_dim);  // of one share

constexpr int kMaxHeadDim = 512;
constexpr int kMaxRows = 64;    // of one share, or a group's; more queries are taken in turns
constexpr int kMaxGroup = 512;  // query heads per KV head

// The functions above, which every instruction set's file has under their names.
#define MIKV_KERNELS(isa)                                                                                     \
  {                                                                                                           \
    isa, attend_share, attend_join, pack, demote, fill_holes, unpack, score_keys, score_share, score_join,    \
        prepare_tables, prepare_bytes, lut_tile, byte_tile, kMostLutRows, stream                              \
  }

extern const Kernels kernels_scalar, kernels_avx2, kernels_avx512, kernels_neon;

}  // namespace mikv
