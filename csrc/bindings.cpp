// mikv._native: checks what Python passes, releases the GIL, calls the operation. No arithmetic. `mikv.ops.cpu` is its
// only user; shapes are those of `mikv.ops`.
#include "arguments.h"
#include "dispatch.h"
#include "operations.h"
#include "threads.h"

namespace nb = nanobind;

namespace mikv {
namespace {

int32_t group_of(int64_t num_heads, int64_t num_kv_heads) {
  require_range("KV heads", num_kv_heads, 1, kMaxInt);
  if (num_heads % num_kv_heads != 0) {
    refuse("queries have ", num_heads, " heads, not a multiple of ", num_kv_heads, " KV heads");
  }
  return require_range("query heads per KV head", num_heads / num_kv_heads, 1, kMaxGroup);
}

// The slots (G, n) of a row, each in use.
std::vector<int64_t> slots_of(const Array& array, const Tier& tier, int64_t row, const Shape& shape) {
  const int64_t* data = numbers_of<int64_t>("slots", array, shape);
  std::vector<int64_t> slots(data, data + array.size());
  for (int64_t slot : slots) {
    if (slot < 0 || slot >= tier.counts[row]) refuse("slot=", slot, " is not in 0..", tier.counts[row] - 1);
  }
  return slots;
}

void py_attend(const Array& queries, const Array& keys, const Array& values, const MaybeArray& mask,
               const TierArgument& high, const std::optional<TierArgument>& low, const TransformArgument& transforms,
               float scale, float softcap, const MaybeArray& sinks, const MaybeArray& query_weight, bool exact,
               int num_threads, const Array& output, const MaybeArray& received_high, const MaybeArray& received_new) {
  require_axes("queries", queries, 4);
  require_axes("new keys", keys, 4);
  const int64_t B = queries.shape(0), H = queries.shape(1), Tq = queries.shape(2), D = queries.shape(3),
                G = keys.shape(1), num_new = keys.shape(2);
  Attend call{};
  call.batch = require_range("batch", B, 0, kMaxInt);
  call.group = group_of(H, G);
  call.num_kv_heads = int32_t(G);
  call.num_queries = require_range("queries", Tq, 0, kMaxInt);
  call.head_dim = require_range("head_dim", D, 1, kMaxHeadDim);
  call.num_new = require_range("new tokens", num_new, 0, kMaxInt);
  call.queries = tokens_of("queries", queries, {B, H, Tq, D});
  call.new_keys = tokens_of("new keys", keys, {B, G, num_new, D});
  call.new_values = tokens_of("new values", values, {B, G, num_new, D});
  call.mask = mask_of(mask, {B, 1, Tq, num_new}, &call.mask_batch_stride, &call.mask_query_stride);
  if (!mask && num_new != 0 && num_new < Tq) {
    refuse(Tq, " queries are more than the ", num_new, " new tokens; pass a mask");
  }
  Indices own[2];
  for (const TierArgument* argument : {&high, low ? &*low : nullptr}) {
    if (argument == nullptr) continue;
    const char* name = argument == &high ? "high tier" : "low tier";
    if (num_rows(*argument) != B) refuse(name, " has pages of ", num_rows(*argument), " rows; the batch has ", B);
    Tier& tier = call.tiers[call.num_tiers] = tier_of(name, *argument, G, D, own[call.num_tiers]);
    ++call.num_tiers;
    for (int64_t row = 0; row < B; ++row) require_counts(name, tier, num_pages(*argument), row);
  }
  std::tie(call.key_transform, call.value_transform) = transforms_of(transforms, {B, G, 1, D});
  call.scale = require_finite("scale", scale);
  call.softcap = require_finite("softcap", softcap);
  if (softcap < 0) refuse("softcap is negative; 0 is none");
  call.sinks = numbers_of<float>("sinks", sinks, {H});
  call.query_weight = numbers_of<float>("query_weight", query_weight, {B, Tq});
  call.exact = exact;
  call.output = whole_like("output", output, queries);
  call.received_stride[0] = capacity(call.tiers[0]);
  call.received[0] = numbers_of<float>("received of the high tier", received_high, {B, G, call.received_stride[0]});
  call.received_new = numbers_of<float>("received of the new tokens", received_new, {B, G, num_new});
  for (const Array* written : {&output, maybe(received_high), maybe(received_new)}) {
    if (written == nullptr) continue;
    require_apart("a result", *written, {&output, maybe(received_high), maybe(received_new), &queries, &keys, &values,
                                         maybe(mask), maybe(sinks), maybe(query_weight)});
    require_apart("a result", *written, high);
    if (low) require_apart("a result", *written, *low);
  }
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  attend(call, num_threads);
}

int py_pack(const TierArgument& argument, int64_t row, int64_t first_slot, const Array& keys, const Array& values,
            const TransformArgument& transforms, const MaybeArray& key_feedback, int num_threads) {
  require_axes("keys", keys, 3);
  const int64_t G = keys.shape(0), n = keys.shape(1), D = keys.shape(2);
  Pack call{};
  call.num_kv_heads = require_range("KV heads", G, 0, kMaxInt);
  call.num_tokens = require_range("tokens", n, 0, kMaxInt);
  call.head_dim = require_range("head_dim", D, 1, kMaxHeadDim);
  call.first_slot = first_slot;
  call.keys = tokens_of("keys", keys, {G, n, D});
  call.values = tokens_of("values", values, {G, n, D});
  Indices own;
  call.tier = tier_of("tier", argument, G, D, own);
  call.row = require_range("row", row, 0, num_rows(argument) - 1);
  require_slots("tier", call.tier, num_pages(argument), row, first_slot, n);
  if (call.tier.keys.format.numbers == kChannel && (first_slot % kBlockTokens != 0 || n % kBlockTokens != 0)) {
    refuse(n, " tokens from slot ", first_slot, " on are not whole blocks of 32, as per-channel keys must be");
  }
  std::tie(call.key_transform, call.value_transform) = transforms_of(transforms, {G, 1, D});
  call.key_feedback = feedback_of(key_feedback, call.tier.keys.format, {G, D, D});
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  return pack(call, num_threads);
}

int py_append(const TierArgument& high, const Array& score, const Array& position, const Array& keys,
              const Array& values, const Array& scores, const std::vector<int64_t>& first_positions,
              const TransformArgument& transforms, int num_threads) {
  require_axes("keys", keys, 4);
  const int64_t B = keys.shape(0), G = keys.shape(1), n = keys.shape(2), D = keys.shape(3);
  Append call{};
  Pack& rows = call.rows;
  call.batch = require_range("batch", B, 0, kMaxInt);
  rows.num_kv_heads = require_range("KV heads", G, 0, kMaxInt);
  rows.num_tokens = require_range("tokens", n, 0, kMaxInt);
  rows.head_dim = require_range("head_dim", D, 1, kMaxHeadDim);
  rows.keys = tokens_of("keys", keys, {B, G, n, D});
  rows.values = tokens_of("values", values, {B, G, n, D});
  Indices own;
  rows.tier = tier_of("high tier", high, G, D, own);
  if (rows.tier.keys.format.numbers == kChannel) refuse("tokens cannot be appended to per-channel keys");
  if (num_rows(high) != B) refuse("high tier has pages of ", num_rows(high), " rows; the batch has ", B);
  for (int64_t row = 0; row < B; ++row) {
    require_slots("high tier", rows.tier, num_pages(high), row, rows.tier.counts[row], n);
  }
  const Shape book{num_pages(high), G, rows.tier.blocks_per_page, kBlockTokens};
  call.book = {book_part_of<float>("score", score, book), book_part_of<int32_t>("position", position, book)};
  call.scores = numbers_of<float>("scores", scores, {B, G, n});
  if (int64_t(first_positions.size()) != B) refuse(int64_t(first_positions.size()), " first positions for ", B, " rows");
  for (int64_t position : first_positions) require_range("first position", position, 0, kMaxInt - n);
  call.first_positions = first_positions.data();
  std::tie(rows.key_transform, rows.value_transform) = transforms_of(transforms, {B, G, 1, D});
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  return append(call, num_threads);
}

void py_unpack(const TierArgument& argument, int64_t row, const Array& slots, const Array& keys, const Array& values,
               int num_threads) {
  require_axes("keys", keys, 3);
  const int64_t G = keys.shape(0), n = keys.shape(1), D = keys.shape(2);
  Unpack call{};
  call.num_kv_heads = require_range("KV heads", G, 0, kMaxInt);
  call.num_tokens = require_range("tokens", n, 0, kMaxInt);
  call.head_dim = require_range("head_dim", D, 1, kMaxHeadDim);
  Indices own;
  call.tier = tier_of("tier", argument, G, D, own);
  call.row = require_range("row", row, 0, num_rows(argument) - 1);
  require_counts("tier", call.tier, num_pages(argument), row);
  const std::vector<int64_t> own_slots = slots_of(slots, call.tier, row, {G, n});
  call.slots = own_slots.data();
  call.keys = numbers_of<float>("keys", keys, {G, n, D});
  call.values = numbers_of<float>("values", values, {G, n, D});
  require_apart("keys", keys, {&values});
  for (const Array* written : {&keys, &values}) require_apart("a result", *written, argument);
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  unpack(call, num_threads);
}

int py_demote(const TierArgument& high, const std::optional<TierArgument>& low, const Array& score,
              const Array& position, int64_t row, const Array& slots, int64_t head_dim,
              const TransformArgument& transforms, const MaybeArray& key_feedback, int num_threads) {
  require_axes("slots", slots, 2);
  const int64_t G = slots.shape(0), count = slots.shape(1);
  Demote call{};
  call.num_kv_heads = require_range("KV heads", G, 0, kMaxInt);
  call.count = require_range("slots", count, 0, kMaxInt);
  call.head_dim = require_range("head_dim", head_dim, 1, kMaxHeadDim);
  Indices own[2];
  call.high = tier_of("high tier", high, G, head_dim, own[0]);
  call.row = require_range("row", row, 0, num_rows(high) - 1);
  require_counts("high tier", call.high, num_pages(high), row);
  const std::vector<int64_t> own_slots = slots_of(slots, call.high, row, {G, count});
  call.slots = own_slots.data();
  for (int64_t i = 1; i < G * count; ++i) {
    if (i % count != 0 && call.slots[i] <= call.slots[i - 1]) refuse("slots of a head are not in ascending order");
  }
  const Shape book{num_pages(high), G, call.high.blocks_per_page, kBlockTokens};
  call.book = {book_part_of<float>("score", score, book), book_part_of<int32_t>("position", position, book)};
  call.drop = !low;
  if (low) {
    call.low = tier_of("low tier", *low, G, head_dim, own[1]);
    if (call.high.is_transformed && !call.low.is_transformed) {
      refuse("high tier is transformed and low tier is not; tokens cannot go back to the basis of the model");
    }
    if (num_rows(*low) != num_rows(high)) refuse("low tier has ", num_rows(*low), " rows; use ", num_rows(high));
    require_counts("low tier", call.low, num_pages(*low), row);
    const int64_t first = call.low.counts[row];
    if (first % kBlockTokens != 0) refuse("low tier: counts[", row, "]=", first, " is not a multiple of 32");
    if (count % kBlockTokens != 0) refuse(count, " slots of a head are not a multiple of 32");
    require_slots("low tier", call.low, num_pages(*low), row, first, count);
    call.key_feedback = feedback_of(key_feedback, call.low.keys.format, {G, head_dim, head_dim});
  } else if (key_feedback) {
    refuse("key feedback is for tokens that are stored; without a low tier they are dropped");
  }
  std::tie(call.key_transform, call.value_transform) = transforms_of(transforms, {G, 1, head_dim});
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  return demote(call, num_threads);
}

void py_score_prompt(const Array& queries, const Array& keys, const MaybeArray& mask, float scale, float softcap,
                     const MaybeArray& sinks, const MaybeArray& query_weight, int64_t stride, int64_t distance,
                     int num_threads, const Array& received) {
  require_axes("queries", queries, 4);
  require_axes("keys", keys, 4);
  const int64_t B = queries.shape(0), H = queries.shape(1), Tq = queries.shape(2), D = queries.shape(3),
                G = keys.shape(1), T = keys.shape(2);
  ScorePrompt call{};
  call.batch = require_range("batch", B, 0, kMaxInt);
  call.group = group_of(H, G);
  call.num_kv_heads = int32_t(G);
  call.num_queries = require_range("queries", Tq, 1, kMaxInt);
  call.num_tokens = require_range("tokens", T, 1, kMaxInt - kScorePanel);  // rounded up to panels
  call.head_dim = require_range("head_dim", D, 1, kMaxHeadDim);
  call.stride = require_range("stride", stride, 1, kMaxInt);
  call.distance = require_range("distance", distance, 0, kMaxInt);
  if ((Tq - 1) * stride >= T) refuse(Tq, " queries of every ", stride, "th token are more than ", T, " tokens have");
  call.queries = tokens_of("queries", queries, {B, H, Tq, D});
  call.keys = tokens_of("keys", keys, {B, G, T, D});
  call.mask = mask_of(mask, {B, 1, Tq, T}, &call.mask_batch_stride, &call.mask_query_stride);
  call.scale = require_finite("scale", scale);
  call.softcap = require_finite("softcap", softcap);
  if (softcap < 0) refuse("softcap is negative; 0 is none");
  call.sinks = numbers_of<float>("sinks", sinks, {H});
  call.query_weight = numbers_of<float>("query_weight", query_weight, {B, Tq});
  call.received = numbers_of<float>("received", received, {B, G, T});
  require_apart("received", received, {&queries, &keys, maybe(mask), maybe(sinks), maybe(query_weight)});
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  score_prompt(call, num_threads);
}

// Output rows, inputs, inputs per group, planes, planes that are read, and whether uniform and with an offset.
using MatmulSizes = std::array<int64_t, 7>;

Matmul matmul_of(const MatmulSizes& sizes) {
  Matmul call{};
  call.out_features = require_range("out_features", sizes[0], 1, kMaxInt);
  call.in_features = require_range("in_features", sizes[1], 1, kMaxInt / kTableBytes);
  call.group_size = require_range("group_size", sizes[2], 1, call.in_features);
  if (call.group_size % 32 != 0 && call.group_size != call.in_features) {
    refuse("group_size=", call.group_size, " is neither a multiple of 32 nor in_features=", call.in_features);
  }
  call.planes = require_range("planes", sizes[3], 1, kMaxPlanes);
  call.bits = require_range("bits", sizes[4], 1, call.planes);
  call.uniform = require_range("uniform", sizes[5], 0, 1);
  call.has_offset = require_range("has_offset", sizes[6], 0, 1);
  return call;
}

void py_matmul(const Array& inputs, const Array& codes, const Array& scales, const MaybeArray& bias,
               const MatmulSizes& sizes, int path, int num_threads, const Array& output) {
  Matmul call = matmul_of(sizes);
  const Rows rows = rows_of("inputs", inputs, call.in_features), out = rows_of("output", output, call.out_features);
  call.num_rows = rows.num_rows, call.numbers = rows.numbers, call.inputs = rows.data, call.output = out.data;
  if (out.num_rows != rows.num_rows) refuse("output has ", out.num_rows, " rows; inputs have ", rows.num_rows);
  if (out.numbers != rows.numbers) refuse("output has dtype ", output.dtype(), "; inputs have ", inputs.dtype());
  call.codes = numbers_of<uint8_t>("codes", codes, {tiles_of(call), tile_bytes(call)});
  call.scales = numbers_of<uint16_t>("scales", scales, {tiles_of(call), groups_of(call), scales_of(call), kTileRows});
  if (bias) {
    const Rows numbers = rows_of("bias", *bias, call.out_features);
    if (numbers.num_rows != 1) refuse("bias has ", numbers.num_rows, " rows; it must have one");
    call.bias = numbers.data, call.bias_numbers = numbers.numbers;
  }
  require_apart("output", output, {&inputs, &codes, &scales, maybe(bias)});
  require_range("path", path, kFaster, kBytes);
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  matmul(call, MatmulPath(path), num_threads);
}

uint64_t py_stream(const Array& data, int num_threads) {
  require_axes("data", data, 1);
  const float* first = numbers_of<float>("data", data, {data.shape(0)});
  require_threads(num_threads);
  nb::gil_scoped_release unlocked;
  return stream(first, size_t(data.shape(0)) * sizeof(float), num_threads);
}

std::vector<std::string> names(const std::vector<const Kernels*>& tables) {
  std::vector<std::string> all;
  for (const Kernels* table : tables) all.push_back(table->isa);
  return all;
}

template <size_t n>
nb::list list_of(const int (&numbers)[n]) {
  nb::list all;
  for (int number : numbers) all.append(number);
  return all;
}

}  // namespace

NB_MODULE(_native, m) {
  using nb::arg;
  m.def("attend", &py_attend, arg("queries").noconvert(), arg("keys").noconvert(), arg("values").noconvert(),
        arg("mask").noconvert().none(), arg("high").noconvert(), arg("low").noconvert().none(),
        arg("transforms").noconvert(), arg("scale"), arg("softcap"), arg("sinks").noconvert().none(),
        arg("query_weight").noconvert().none(), arg("exact"), arg("num_threads"), arg("output").noconvert(),
        arg("received_high").noconvert().none(), arg("received_new").noconvert().none());
  m.def("pack", &py_pack, arg("tier").noconvert(), arg("row"), arg("first_slot"), arg("keys").noconvert(),
        arg("values").noconvert(), arg("transforms").noconvert(), arg("key_feedback").noconvert().none(),
        arg("num_threads"));
  m.def("append", &py_append, arg("high").noconvert(), arg("score").noconvert(), arg("position").noconvert(),
        arg("keys").noconvert(), arg("values").noconvert(), arg("scores").noconvert(),
        arg("first_positions"), arg("transforms").noconvert(), arg("num_threads"));
  m.def("unpack", &py_unpack, arg("tier").noconvert(), arg("row"), arg("slots").noconvert(), arg("keys").noconvert(),
        arg("values").noconvert(), arg("num_threads"));
  m.def("demote", &py_demote, arg("high").noconvert(), arg("low").noconvert().none(), arg("score").noconvert(),
        arg("position").noconvert(), arg("row"), arg("slots").noconvert(), arg("head_dim"),
        arg("transforms").noconvert(), arg("key_feedback").noconvert().none(), arg("num_threads"));
  m.def("score_prompt", &py_score_prompt, arg("queries").noconvert(), arg("keys").noconvert(),
        arg("mask").noconvert().none(), arg("scale"), arg("softcap"), arg("sinks").noconvert().none(),
        arg("query_weight").noconvert().none(), arg("stride"), arg("distance"), arg("num_threads"),
        arg("received").noconvert());
  m.def("matmul", &py_matmul, arg("inputs").noconvert(), arg("codes").noconvert(), arg("scales").noconvert(),
        arg("bias").noconvert().none(), arg("sizes"), arg("path"), arg("num_threads"), arg("output").noconvert());
  m.def("stream", &py_stream, arg("data").noconvert(), arg("num_threads"));

  m.def("isa", [] { return kernels().isa; });
  m.def("isas_compiled", [] { return names(compiled_kernels()); });
  m.def("isas_available", [] { return names(available_kernels()); });
  m.def("use_isa", &use_isa, arg("name"));
  m.def("thread_provider", &thread_provider);

  m.attr("LEVELS") = nb::make_tuple(list_of(kLloydMax2), list_of(kLloydMax3), list_of(kLloydMax4));
  m.attr("STEPS") = nb::make_tuple(kLloydMaxStep2, kLloydMaxStep3, kLloydMaxStep4);
}

}  // namespace mikv
