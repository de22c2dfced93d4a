// Compares every instruction set that runs here with the scalar one, and the codes of error feedback with what defines
// them, on random shapes, formats and numbers, which a seed stands for. Needs no Python: it runs under emulators, and
// under sanitizers, for which every buffer has its exact size.
//   mikv_check [rounds, or seconds as in 60s] [first seed]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../dispatch.h"
#include "../operations.h"

namespace mikv {
namespace {

constexpr int kThreads = 2;

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint64_t bits() {  // xorshift64*
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d >> 16;
  }
  int64_t in(int64_t low, int64_t high) { return low + int64_t(bits() % uint64_t(high - low + 1)); }
  bool often(int percent) { return in(1, 100) <= percent; }
  template <class T>
  T one_of(std::initializer_list<T> all) {
    return all.begin()[in(0, int64_t(all.size()) - 1)];
  }
  float normal() {  // nearly: the sum of 12 uniform numbers
    float sum = -6;
    for (int i = 0; i < 12; ++i) sum += float(bits() & 0xffff) / 65536;
    return sum;
  }
  uint16_t half(int low, int high, bool positive) {  // of magnitude 2^low to 2^high
    const int64_t magnitude = in((15 + low) * 1024, (15 + high) * 1024 - 1);
    return uint16_t(positive ? magnitude : magnitude | in(0, 1) << 15);
  }

 private:
  uint64_t state_;
};

// Memory of exactly n numbers, which sanitizers watch.
template <class T>
using Buffer = std::vector<T>;

Buffer<float> normals(Random& random, int64_t n, float scale) {
  Buffer<float> all(size_t(n), 0.0f);
  for (float& x : all) x = scale * random.normal();
  return all;
}

Buffer<uint16_t> halves(Random& random, int64_t n, int low, int high, bool positive) {
  Buffer<uint16_t> all(static_cast<size_t>(n));
  for (uint16_t& x : all) x = random.half(low, high, positive);
  return all;
}

// The sizes of one round.
struct Sizes {
  int32_t batch, heads, group, head_dim;
  int64_t padded;

  explicit Sizes(Random& random)
      : batch(int32_t(random.in(1, 2))),
        heads(int32_t(random.in(1, 3))),
        group(random.one_of({1, 2, 3, 4, 7, 8})),
        head_dim(random.one_of({16, 40, 64, 80, 96, 128, 256})),
        padded(padded_channels(head_dim)) {}
};

// A tier with its memory, whose pages are out of order and hold NaN where nothing was written.
class Store {
 public:
  Store(const Sizes& sizes, Format keys, Format values, int64_t num_blocks, bool transformed, Random& random)
      : sizes_(sizes), counts(size_t(sizes.batch), 0) {
    blocks_per_page_ = random.in(1, 3);
    pages_per_row_ = (num_blocks + blocks_per_page_ - 1) / blocks_per_page_;
    pages_.resize(size_t(sizes.batch * pages_per_row_));
    for (size_t i = 0; i < pages_.size(); ++i) pages_[i] = int32_t(pages_.size() - 1 - i);
    for (const Format& format : {keys, values}) formats_.push_back(format), add_parts(format);
    score_.assign(pages_.size() * size_t(sizes.heads * blocks_per_page_ * kBlockTokens), 0.0f);
    position_.assign(score_.size(), 0);
    transformed_ = transformed;
  }

  Tier tier() {
    const Side keys = side(0), values = side(1);
    return {keys, values, pages_.data(), pages_per_row_, blocks_per_page_, counts.data(), transformed_};
  }

  Slots book() {
    return {part(reinterpret_cast<char*>(score_.data()), kBlockTokens * 4),
            part(reinterpret_cast<char*>(position_.data()), kBlockTokens * 4)};
  }

  int64_t capacity() const { return pages_per_row_ * blocks_per_page_ * kBlockTokens; }

 private:
  static int64_t float_bytes(const Format& format) { return format.numbers == kFloat32 ? 4 : 2; }

  int64_t scale_numbers(const Format& format) const {
    return format.numbers == kChannel ? sizes_.head_dim
           : format.numbers == kGroup ? sizes_.head_dim / format.group_size * kBlockTokens
                                      : kBlockTokens;
  }

  void add_parts(const Format& format) {
    const bool floats = format.numbers <= kBfloat16;
    const int64_t codes = floats ? kBlockTokens * sizes_.head_dim * float_bytes(format)
                                 : sizes_.padded / kUnitChannels * unit_bytes(format.bits);
    for (int64_t bytes : {codes, floats ? 0 : 2 * scale_numbers(format), format.numbers < kGroup ? 0 : 2 * scale_numbers(format)}) {
      block_bytes_.push_back(bytes);
      parts_.emplace_back(pages_.size() * size_t(sizes_.heads * blocks_per_page_ * bytes), char(0xff));
    }
  }

  Part part(char* data, int64_t bytes) const {
    return {data, sizes_.heads * blocks_per_page_ * bytes, blocks_per_page_ * bytes, bytes};
  }

  Part part(size_t i) { return block_bytes_[i] == 0 ? Part{} : part(parts_[i].data(), block_bytes_[i]); }

  Side side(size_t which) {
    return {formats_[which], part(3 * which), part(3 * which + 1), part(3 * which + 2)};
  }

  Sizes sizes_;
  std::vector<Format> formats_;
  std::vector<int64_t> block_bytes_;
  std::vector<Buffer<char>> parts_;
  Buffer<int32_t> pages_, position_;
  Buffer<float> score_;
  int64_t blocks_per_page_, pages_per_row_;
  bool transformed_;

 public:
  Buffer<int64_t> counts;
};

Format random_format(Random& random, bool keys, bool low, int32_t head_dim) {
  if (!low && random.often(40)) return {random.one_of({kFloat32, kFloat16, kBfloat16}), 0, 0};
  const Numbers numbers = random.one_of({kLloydMax, kLloydMax, kUniform, kGroup, low && keys ? kChannel : kGroup});
  const int32_t group_size = head_dim % 32 == 0 ? random.one_of({32, head_dim / 2}) : head_dim / 2;
  return {numbers, low ? random.one_of({2, 3, 4, 8}) : random.one_of({4, 8}), group_size};
}

// The transforms of all rows, with their memory. Centers are smaller than the tokens: what is stored is the difference,
// and rounding it must not cost much more than rounding the tokens would.
struct Basis {
  Buffer<uint16_t> key_center, key_balancer, value_center;
  int32_t rotation;

  Basis(const Sizes& sizes, int token_size, Random& random) {
    const int64_t n = int64_t(sizes.batch) * sizes.heads * sizes.head_dim;
    if (random.often(70)) key_center = halves(random, n, token_size - 2, token_size, false);
    if (random.often(70)) key_balancer = halves(random, n, -2, 2, true);
    if (random.often(70)) value_center = halves(random, n, token_size - 2, token_size, false);
    rotation = random.often(70) ? sizes.head_dim & -sizes.head_dim : 1;
  }

  static const uint16_t* at(const Buffer<uint16_t>& all, int64_t offset) {
    return all.empty() ? nullptr : all.data() + offset;
  }
  Transform keys(int64_t offset = 0) const { return {at(key_center, offset), at(key_balancer, offset), rotation}; }
  Transform values(int64_t offset = 0) const { return {at(value_center, offset), nullptr, rotation}; }
};

Tokens tokens(const Buffer<float>& data, int64_t num_heads, int64_t num_tokens, int64_t head_dim) {
  return {data.data(), kFloat32, num_heads * num_tokens * head_dim, num_tokens * head_dim, head_dim};
}

// Numbers that every instruction set must give, and how far from the scalar ones they may be as a share of the root mean
// square of those.
struct Result {
  const char* name;
  Buffer<float> numbers;
  double largest;  // difference of a number
  double typical;  // root mean square of the differences
  int flips;       // numbers that may be further off, by a step of the codes
};

// Float sums in another order; queries and weights of 8 bits, or of 15, which avx512 rounds to finer steps than others;
// numbers on the border between two codes. Several times what 2,000 rounds have shown.
Result same(const char* name, Buffer<float> numbers) { return {name, std::move(numbers), 1e-3, 1e-4, 0}; }
Result bytes(const char* name, Buffer<float> numbers) { return {name, std::move(numbers), 0.2, 2e-2, 0}; }
// The same sums looked up, but for ties between two entries of a table; levels of 7 bits instead of 8.
Result looked_up(const char* name, Buffer<float> numbers) { return {name, std::move(numbers), 5e-2, 5e-3, 0}; }
Result levels(const char* name, Buffer<float> numbers) { return {name, std::move(numbers), 0.15, 3e-2, 0}; }
Result codes(const char* name, Buffer<float> numbers) { return {name, std::move(numbers), 1e-2, 2e-3, 20}; }

// All that is random about a round.
struct Round {
  Random random;
  Sizes sizes;
  int token_size;  // logarithm
  Basis basis;
  Store high, low;
  bool with_low;
  int32_t num_queries, num_new, prompt_stride, prompt_distance;
  Buffer<float> tokens[2][2];  // of the tiers: keys, values; (B, G, capacity, D)
  Buffer<float> queries, new_tokens[2], sinks, query_weight, prompt_queries, prompt_keys;
  int32_t num_prompt;
  Buffer<uint8_t> mask;
  float softcap;

  explicit Round(uint64_t seed)
      : random(seed),
        sizes(random),
        token_size(random.one_of({0, 0, -10, 5})),
        basis(sizes, token_size, random),
        // braces: in this order with every compiler
        high{sizes, random_format(random, true, false, sizes.head_dim),
             random_format(random, false, false, sizes.head_dim), random.in(1, 6), random.often(50), random},
        low{sizes, random_format(random, true, true, sizes.head_dim), random_format(random, false, true, sizes.head_dim),
            random.in(2, 20), true, random},
        with_low(random.often(85)),
        num_queries(random.one_of({1, 1, 1, 2, 5, 33})),
        num_new(num_queries),
        prompt_stride(int32_t(random.in(1, 3))),
        prompt_distance(int32_t(random.often(50) ? 0 : random.in(1, 200))) {
    // softmax multiplies errors by the size of the logits, so queries are not large
    const float large = std::ldexp(1.0f, token_size), query_size = 1 / std::max(large, 1.0f);
    Store* stores[] = {&high, &low};
    const int64_t num_heads = int64_t(sizes.batch) * sizes.heads, D = sizes.head_dim;
    for (int i = 0; i < 2; ++i) {
      for (auto& side : tokens[i]) side = normals(random, num_heads * stores[i]->capacity() * D, large);
      for (int64_t& count : stores[i]->counts) count = random.in(0, stores[i]->capacity());
    }
    // whole blocks, and room for one more
    for (int64_t& count : low.counts) count = std::min(count, low.capacity() - kBlockTokens) / kBlockTokens * kBlockTokens;
    queries = normals(random, num_heads * sizes.group * num_queries * D, query_size);
    for (auto& side : new_tokens) side = normals(random, num_heads * num_new * D, large);
    if (random.often(30)) sinks = normals(random, sizes.heads * sizes.group, 1);
    if (random.often(30)) query_weight = Buffer<float>(size_t(sizes.batch * num_queries), 0.5f);
    if (random.often(30)) {
      mask.resize(size_t(sizes.batch * num_queries * num_new));
      for (uint8_t& x : mask) x = random.often(70);
    }
    softcap = random.often(20) ? 20.0f : 0.0f;
    num_prompt = int32_t(random.in(1, 300));
    const int64_t prompt_rows = num_heads * sizes.group * ((num_prompt - 1) / prompt_stride + 1);
    prompt_queries = normals(random, prompt_rows * D, query_size);
    prompt_keys = normals(random, num_heads * num_prompt * D, large);
  }
};

// Packs the random tokens of all rows: most at once, the last few one by one, unless whole blocks are asked for.
void fill(const Round& round, Store& store, const Buffer<float> (&tokens)[2], bool whole_blocks) {
  const int64_t D = round.sizes.head_dim, G = round.sizes.heads, row_numbers = G * store.capacity() * D;
  for (int32_t row = 0; row < round.sizes.batch; ++row) {
    const int64_t count = store.counts[size_t(row)], at_once = whole_blocks ? count : std::max<int64_t>(count - 3, 0);
    for (int64_t first = 0; first < count; first = first < at_once ? at_once : first + 1) {
      const int64_t stop = first < at_once ? at_once : first + 1, offset = row * row_numbers + first * D;
      const Tokens keys{tokens[0].data() + offset, kFloat32, 0, store.capacity() * D, D};
      const Tokens values{tokens[1].data() + offset, kFloat32, 0, store.capacity() * D, D};
      pack({row, int32_t(D), int32_t(G), int32_t(stop - first), first, keys, values, round.basis.keys(row * G * D),
            round.basis.values(row * G * D), store.tier(), nullptr}, kThreads);
    }
  }
}

// All tokens of all rows, decoded.
Buffer<float> decoded(const Round& round, Store& store) {
  const int64_t D = round.sizes.head_dim, G = round.sizes.heads;
  Buffer<float> all;
  for (int32_t row = 0; row < round.sizes.batch; ++row) {
    const int64_t count = store.counts[size_t(row)];
    Buffer<int64_t> slots(size_t(G * count));
    for (size_t i = 0; i < slots.size(); ++i) slots[i] = int64_t(i) % count;
    Buffer<float> keys(slots.size() * size_t(D)), values(keys.size());
    unpack({store.tier(), row, int32_t(D), int32_t(G), int32_t(count), slots.data(), keys.data(), values.data()},
           kThreads);
    all.insert(all.end(), keys.begin(), keys.end());
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

void add_attention(Round& round, bool exact, std::vector<Result>& results) {
  const Sizes& sizes = round.sizes;
  const int64_t B = sizes.batch, G = sizes.heads, H = G * sizes.group, D = sizes.head_dim, Tq = round.num_queries;
  Attend call{};
  call.batch = sizes.batch, call.num_kv_heads = sizes.heads, call.group = sizes.group;
  call.num_queries = round.num_queries, call.head_dim = sizes.head_dim, call.num_new = round.num_new;
  call.queries = tokens(round.queries, H, Tq, D);
  call.new_keys = tokens(round.new_tokens[0], G, round.num_new, D);
  call.new_values = tokens(round.new_tokens[1], G, round.num_new, D);
  call.mask = round.mask.empty() ? nullptr : round.mask.data();
  call.mask_batch_stride = Tq * round.num_new, call.mask_query_stride = round.num_new;
  call.tiers[call.num_tiers++] = round.high.tier();
  if (round.with_low) call.tiers[call.num_tiers++] = round.low.tier();
  call.key_transform = round.basis.keys(), call.value_transform = round.basis.values();
  call.scale = 1 / std::sqrt(float(D)), call.softcap = round.softcap, call.exact = exact;
  call.sinks = round.sinks.empty() ? nullptr : round.sinks.data();
  call.query_weight = round.query_weight.empty() ? nullptr : round.query_weight.data();
  Buffer<float> output(size_t(B * H * Tq * D)), received_high(size_t(B * G * round.high.capacity()));
  Buffer<float> received_new(size_t(B * G * round.num_new));
  call.output = output.data(), call.received_new = received_new.data();
  call.received[0] = received_high.data(), call.received_stride[0] = round.high.capacity();
  attend(call, kThreads);
  const auto result = exact ? same : bytes;
  results.push_back(result(exact ? "exact attention" : "attention", std::move(output)));
  results.push_back(result(exact ? "exact received" : "received", std::move(received_high)));
  results.push_back(result(exact ? "exact received by new" : "received by new", std::move(received_new)));
}

void add_prompt_scores(Round& round, std::vector<Result>& results) {
  const Sizes& sizes = round.sizes;
  ScorePrompt call{};
  call.batch = sizes.batch, call.num_kv_heads = sizes.heads, call.group = sizes.group, call.head_dim = sizes.head_dim;
  call.num_tokens = round.num_prompt, call.stride = round.prompt_stride;
  call.distance = round.prompt_distance;
  call.num_queries = (round.num_prompt - 1) / round.prompt_stride + 1;
  call.queries = tokens(round.prompt_queries, sizes.heads * sizes.group, call.num_queries, sizes.head_dim);
  call.keys = tokens(round.prompt_keys, sizes.heads, round.num_prompt, sizes.head_dim);
  call.scale = 1 / std::sqrt(float(sizes.head_dim)), call.softcap = round.softcap;
  call.sinks = round.sinks.empty() ? nullptr : round.sinks.data();
  Buffer<float> received(size_t(sizes.batch * sizes.heads * round.num_prompt));
  call.received = received.data();
  score_prompt(call, kThreads);
  results.push_back(same("prompt scores", std::move(received)));
}

// Moves a block of the first row's oldest, every second token, to the low tier.
void add_demotion(Round& round, std::vector<Result>& results) {
  const int64_t G = round.sizes.heads, D = round.sizes.head_dim;
  if (round.high.counts[0] < 2 * kBlockTokens) return;
  Buffer<int64_t> slots(size_t(G * kBlockTokens));
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = 2 * (int64_t(i) % kBlockTokens);
  demote({0, int32_t(D), int32_t(G), kBlockTokens, slots.data(), round.basis.keys(), round.basis.values(),
          round.high.tier(), round.low.tier(), round.high.book(), !round.with_low, nullptr}, kThreads);
  round.high.counts[0] -= kBlockTokens;
  if (round.with_low) round.low.counts[0] += kBlockTokens;
  use_isa("scalar");
  results.push_back(same("high tier after demotion", decoded(round, round.high)));
  results.push_back(codes("low tier after demotion", decoded(round, round.low)));
}

// ---- weights in binary coding

float value_of_brain(uint16_t brain) {
  const uint32_t bits = uint32_t(brain) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A matrix with its memory, and rows of inputs, of which there are enough for the size of their products to be typical.
struct WeightRound {
  Random random;
  Matmul call{};
  Buffer<uint8_t> codes;
  Buffer<uint16_t> scales, brains;
  Buffer<float> inputs, bias, outputs;

  explicit WeightRound(uint64_t seed) : random(seed) {
    call.out_features = random.one_of({1, 7, 63, 64, 65, 200});
    call.in_features = random.one_of({32, 40, 96, 127, 576, 1000});
    const int64_t group_size = random.one_of({32, 64, 96, 128, 192, 1000});
    call.group_size = std::min(group_size, call.in_features);
    call.planes = int32_t(random.in(1, kMaxPlanes)), call.bits = int32_t(random.in(1, call.planes));
    call.uniform = random.often(30), call.has_offset = random.often(50);
    call.num_rows = std::max<int64_t>(random.one_of({1, 2, 3, 5, 8, 33, 300}), 64 / call.out_features);
    codes.resize(size_t(tiles_of(call) * tile_bytes(call)));
    for (uint8_t& x : codes) x = uint8_t(random.bits());
    add_scales();
    inputs = normals(random, call.num_rows * call.in_features, std::ldexp(1.0f, random.one_of({0, 0, -10, 5})));
    outputs.resize(size_t(call.num_rows * call.out_features));
    if (random.often(50)) bias = normals(random, call.out_features, 0.1f);
    call.codes = codes.data(), call.scales = scales.data(), call.bias = bias.empty() ? nullptr : bias.data();
    call.inputs = inputs.data(), call.output = outputs.data();
    if (random.often(30)) use_brains();
  }

  void add_scales() {
    const int64_t n = scales_of(call);
    for (int64_t i = 0; i < tiles_of(call) * groups_of(call) * n; ++i) {
      const bool is_offset = call.has_offset && i % n == n - 1;
      for (int j = 0; j < kTileRows; ++j) scales.push_back(random.half(-5, is_offset ? -4 : -3, !is_offset));
    }
  }

  void use_brains() {
    call.numbers = kBfloat16;
    for (float x : inputs) {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      brains.push_back(uint16_t(bits >> 16));
    }
    call.inputs = brains.data();
  }

  Buffer<float> product(MatmulPath path) {
    Buffer<uint16_t> out(call.numbers == kBfloat16 ? outputs.size() : 0);
    if (!out.empty()) call.output = out.data();
    matmul(call, path, kThreads);
    for (size_t i = 0; i < out.size(); ++i) outputs[i] = value_of_brain(out[i]);
    return outputs;
  }
};

void add_products(uint64_t seed, std::vector<Result>& results) {
  WeightRound round(seed);
  results.push_back(looked_up("product by tables", round.product(kTables)));
  results.push_back(levels("product by bytes", round.product(kBytes)));
}

// All operations with one instruction set, on tiers that the scalar one has packed.
std::vector<Result> run(uint64_t seed, const std::string& isa) {
  std::vector<Result> results;
  Round round(seed), own(seed);
  use_isa("scalar");
  fill(round, round.high, round.tokens[0], false);
  fill(round, round.low, round.tokens[1], true);
  use_isa(isa);
  fill(own, own.high, own.tokens[0], false);
  fill(own, own.low, own.tokens[1], true);
  results.push_back(same("unpacked high tier", decoded(round, round.high)));
  results.push_back(same("unpacked low tier", decoded(round, round.low)));
  add_attention(round, true, results);
  add_attention(round, false, results);
  add_prompt_scores(round, results);
  add_products(seed, results);
  add_demotion(round, results);
  use_isa("scalar");
  results.push_back(codes("packed high tier", decoded(own, own.high)));
  results.push_back(codes("packed low tier", decoded(own, own.low)));
  return results;
}

// ---- error feedback of keys: one tie changes all later codes of a token, so codes are compared with their definition

// Raw tokens and a tier whose keys take feedback, in the same basis; feedback of one row.
struct FeedbackRound {
  Random random;
  Sizes sizes;
  Store high, low;
  int32_t num_tokens, first;
  Buffer<float> keys, values, feedback;

  explicit FeedbackRound(uint64_t seed)
      : random(seed),
        sizes(with_head_dim(Sizes(random), random.one_of({16, 20, 40, 64, 72, 80, 96, 128, 256, 512}))),
        high{sizes, {kFloat32, 0, 0}, {kFloat32, 0, 0}, 4, true, random},
        low{sizes, {random.one_of({kLloydMax, kUniform}), random.one_of({2, 3, 4}), 0},
            random_format(random, false, true, sizes.head_dim), 5, true, random},
        num_tokens(int32_t(random.in(kBlockTokens, std::min(high.capacity(), low.capacity())))),
        first(int32_t(random.in(0, low.capacity() - num_tokens))) {
    const int64_t n = int64_t(sizes.heads) * num_tokens * sizes.head_dim, D = sizes.head_dim;
    const float size = std::ldexp(1.0f, random.one_of({0, 0, -10, 5}));
    keys = normals(random, n, size), values = normals(random, n, size);
    feedback = normals(random, sizes.heads * D * D, 0.5f / std::sqrt(float(D)));
    for (int64_t i = 0; i < int64_t(feedback.size()); ++i) {
      if (i % D <= i / D % D) feedback[size_t(i)] = 0.0f;
    }
  }

  static Sizes with_head_dim(Sizes sizes, int32_t head_dim) {
    sizes.head_dim = head_dim, sizes.padded = padded_channels(head_dim);
    return sizes;
  }

  void pack_into(Store& store, int64_t slot, const float* key_feedback) {
    const int64_t D = sizes.head_dim, G = sizes.heads;
    const Transform none{nullptr, nullptr, 1};
    pack({0, int32_t(D), int32_t(G), num_tokens, slot, mikv::tokens(keys, G, num_tokens, D),
          mikv::tokens(values, G, num_tokens, D), none, none, store.tier(), key_feedback}, kThreads);
  }
};

double value_of_half(uint16_t half) {  // a positive one
  const int exponent = half >> 10, fraction = half & 1023;
  return exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
}

// How much farther than the nearest level of its number a code of this key is, in scales, beyond what float sums explain.
double excess(const float* keys, const float* stored, const float* feedback, double scale, const Format& format,
              int D) {
  const double middle = 0.5 * ((1 << format.bits) - 1);
  std::vector<double> error(static_cast<size_t>(D));
  double worst = 0, largest = 0;
  for (int j = 0; j < D; ++j) {
    double target = keys[j], nearest = INFINITY;
    for (int i = 0; i < j; ++i) target += error[size_t(i)] * feedback[i * D + j];
    for (int code = 0; code < 1 << format.bits; ++code) {
      const LloydMax lloyd = lloyd_max(format.bits);
      const double level = format.numbers == kLloydMax ? lloyd.step * lloyd.levels[code] : code - middle;
      nearest = std::min(nearest, std::fabs(target - scale * level));
    }
    error[size_t(j)] = double(keys[j]) - stored[j];
    largest = std::max(largest, std::fabs(target));
    const double farther = (std::fabs(target - stored[j]) - nearest - 1e-5 * scale - 1e-6 * largest) / scale;
    if (!(farther <= worst)) worst = farther;  // NaN too
  }
  return worst;
}

// Whether the slots from `first_slot` on of every head hold the keys `tokens` (G, n) as feedback rounds them.
bool is_rounded_right(FeedbackRound& round, int64_t first_slot, const Buffer<int64_t>& tokens, const char* what) {
  const int64_t G = round.sizes.heads, n = int64_t(tokens.size()) / G;
  const int D = round.sizes.head_dim;
  Buffer<int64_t> slots(tokens.size());
  for (size_t i = 0; i < slots.size(); ++i) slots[i] = first_slot + int64_t(i) % n;
  Buffer<float> keys(slots.size() * size_t(D)), values(keys.size());
  const Tier tier = round.low.tier();
  unpack({tier, 0, D, int32_t(G), int32_t(n), slots.data(), keys.data(), values.data()}, kThreads);
  double worst = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t head = int64_t(i) / n, slot = slots[i];
    const char* scales = block_address(tier, tier.keys.scale, 0, head, slot / kBlockTokens);
    const double scale = value_of_half(reinterpret_cast<const uint16_t*>(scales)[slot % kBlockTokens]);
    const float* key = round.keys.data() + (head * round.num_tokens + tokens[i]) * D;
    const double beyond = excess(key, keys.data() + i * size_t(D), round.feedback.data() + head * D * D, scale,
                                 tier.keys.format, D);
    if (!(beyond <= worst)) worst = beyond;
  }
  if (worst <= 0) return true;
  std::printf("FAILED %s: a code is %.3g scales farther than the nearest level\n", what, worst);
  return false;
}

bool is_feedback_right(uint64_t seed, const std::string& isa) {
  use_isa(isa);
  FeedbackRound round(seed);
  const int64_t G = round.sizes.heads, n = round.num_tokens;
  Buffer<int64_t> all(size_t(G * n)), demoted(size_t(G * kBlockTokens));
  for (size_t i = 0; i < all.size(); ++i) all[i] = int64_t(i) % n;
  for (size_t i = 0; i < demoted.size(); ++i) demoted[i] = int64_t(i) % kBlockTokens * (n / kBlockTokens);
  round.pack_into(round.low, round.first, round.feedback.data());
  round.low.counts[0] = round.first + n;
  bool right = is_rounded_right(round, round.first, all, "pack with feedback");
  round.pack_into(round.high, 0, nullptr);
  round.high.counts[0] = n, round.low.counts[0] = kBlockTokens;
  const Transform none{nullptr, nullptr, 1};
  demote({0, round.sizes.head_dim, int32_t(G), kBlockTokens, demoted.data(), none, none, round.high.tier(),
          round.low.tier(), round.high.book(), false, round.feedback.data()}, kThreads);
  round.low.counts[0] += kBlockTokens;
  right &= is_rounded_right(round, kBlockTokens, demoted, "demotion with feedback");
  if (!right) std::printf("  seed %llu, %s\n", static_cast<unsigned long long>(seed), isa.c_str());
  return right;
}

bool is_close(const Result& actual, const Result& expected, uint64_t seed, const std::string& isa) {
  constexpr double kLargestStep = 10;
  const double n = double(std::max<size_t>(expected.numbers.size(), 1));
  double squares = 1e-30, largest = 0, squared_difference = 0;
  for (float x : expected.numbers) squares += double(x) * x;
  const double size = std::sqrt(squares / n);
  int flips = 0;
  for (size_t i = 0; i < expected.numbers.size(); ++i) {
    const double difference = std::fabs(double(actual.numbers[i]) - expected.numbers[i]) / size;
    if (difference > expected.largest && difference < kLargestStep && flips++ < expected.flips) continue;
    if (!(difference <= largest)) largest = difference;  // NaN too
    squared_difference += difference * difference;
  }
  const double typical = std::sqrt(squared_difference / n);
  if (largest <= expected.largest && typical <= expected.typical) return true;
  std::printf("FAILED %s, seed %llu, %s: differs by %.3g (largest), %.3g (typical) of the numbers' size\n", isa.c_str(),
              static_cast<unsigned long long>(seed), expected.name, largest, typical);
  return false;
}

bool is_round_right(uint64_t seed) {
  bool right = true;
  const std::vector<Result> expected = run(seed, "scalar");
  for (const Kernels* table : available_kernels()) {
    right &= is_feedback_right(seed, table->isa);
    const std::vector<Result> actual = run(seed, table->isa);
    for (size_t i = 0; i < expected.size(); ++i) right &= is_close(actual[i], expected[i], seed, table->isa);
  }
  return right;
}

}  // namespace
}  // namespace mikv

int main(int argc, char** argv) {
  using Clock = std::chrono::steady_clock;
  char* unit = nullptr;
  const double limit = argc > 1 ? std::strtod(argv[1], &unit) : 20;
  const bool in_seconds = unit && *unit == 's';
  const uint64_t first_seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::string names;
  for (const mikv::Kernels* table : mikv::available_kernels()) names += std::string(" ") + table->isa;
  const auto start = Clock::now();
  int rounds = 0, wrong = 0;
  for (double done = 0; done < limit && wrong < 5;) {
    wrong += !mikv::is_round_right(first_seed + uint64_t(rounds++));
    done = in_seconds ? std::chrono::duration<double>(Clock::now() - start).count() : rounds;
  }
  std::printf("%d rounds of%s from seed %llu: %s\n", rounds, names.c_str(), static_cast<unsigned long long>(first_seed),
              rounds == 0 ? "NOTHING CHECKED" : wrong ? "WRONG" : "all agree");
  return rounds == 0 || wrong != 0;
}
