// Plain C++: what every processor can run, and the readable twin of the other instruction sets. A vector is an array of
// one quad; the compiler may use what the processor's baseline has.
#if defined(__aarch64__)
#include <arm_neon.h>  // half.inc converts 16-bit floats with what every such processor has
#endif

#include <cmath>
#include <cstring>

#include "../kernels.h"
#include "../matmul.h"

namespace mikv {
namespace {

constexpr int kLanes = 16;
struct Floats {
  float lane[kLanes];
};
struct Ints {
  int32_t lane[kLanes];
};
struct Bytes {
  uint8_t byte[4 * kLanes];
};

template <class Function>
inline Floats by_lane(Function function) {
  Floats x;
  for (int i = 0; i < kLanes; ++i) x.lane[i] = function(i);
  return x;
}
template <class Function>
inline Bytes by_byte(Function function) {
  Bytes x;
  for (int i = 0; i < 4 * kLanes; ++i) x.byte[i] = (uint8_t)function(i);
  return x;
}

inline Floats load(const float* p) { return by_lane([&](int i) { return p[i]; }); }
inline void store(float* p, const Floats& x) { memcpy(p, x.lane, sizeof x.lane); }
inline Floats broadcast(float x) { return by_lane([&](int) { return x; }); }
inline Floats add(const Floats& a, const Floats& b) { return by_lane([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Floats sub(const Floats& a, const Floats& b) { return by_lane([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Floats mul(const Floats& a, const Floats& b) { return by_lane([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Floats div(const Floats& a, const Floats& b) { return by_lane([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline Floats max(const Floats& a, const Floats& b) {
  return by_lane([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) {
  return by_lane([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline float reduce_add(const Floats& x) {
  float sum = 0.0f;
  for (float lane : x.lane) sum += lane;
  return sum;
}
inline float reduce_max(const Floats& x) {
  float most = x.lane[0];
  for (float lane : x.lane) most = lane > most ? lane : most;
  return most;
}
inline Floats round_to_int(const Floats& x) { return by_lane([&](int i) { return rintf(x.lane[i]); }); }
inline Floats scale_by_power(const Floats& x, const Floats& exponent) {
  return by_lane([&](int i) {
    const int32_t bits = ((int32_t)exponent.lane[i] + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x.lane[i] * power;
  });
}
inline Floats first_lanes(int count, const Floats& x, const Floats& other) {
  return by_lane([&](int i) { return i < count ? x.lane[i] : other.lane[i]; });
}

inline Bytes load_bytes(const uint8_t* p) { return by_byte([&](int i) { return p[i]; }); }
inline Bytes low_nibbles(const Bytes& x) { return by_byte([&](int i) { return x.byte[i] & 15; }); }
inline Bytes high_nibbles(const Bytes& x) { return by_byte([&](int i) { return x.byte[i] >> 4; }); }
inline Bytes spare_bits(const Bytes& a, const Bytes& b, const Bytes& c) {
  return by_byte([&](int i) { return (a.byte[i] & 0x88) >> 3 | (b.byte[i] & 0x88) >> 2 | (c.byte[i] & 0x88) >> 1; });
}
inline Bytes table(const uint8_t* entries) { return by_byte([&](int i) { return entries[i % 16]; }); }
inline Bytes lookup(const Bytes& entries, const Bytes& index) {
  return by_byte([&](int i) { return entries.byte[index.byte[i] & 15]; });
}

using Dot = Ints;
inline Dot zero_dot() { return {}; }
inline Floats dot_total(const Dot& acc) { return by_lane([&](int i) { return (float)acc.lane[i]; }); }
template <int kRun>
inline void dot_keys(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  int8_t word[16];
  memcpy(word, words, sizeof word);
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < 4 * kLanes; ++i) acc.lane[i / 4] += quads[q].byte[i] * word[4 * q + i % 4];
}
template <int kRun>
inline void dot_values(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  uint8_t word[16];
  memcpy(word, words, sizeof word);
  for (int q = 0; q < 4; ++q)
    for (int i = 0; i < 4 * kLanes; ++i) acc.lane[i / 4] += (int8_t)quads[q].byte[i] * word[4 * q + i % 4];
}

// 16-bit words against 8-bit codes
constexpr int kWideMax = 16383;
constexpr int kWideValueBias = 0;
using Wide = Ints;
inline Wide zero_wide() { return {}; }
inline void split_keys(const int32_t* four, int32_t* words) {
  const int16_t halves[4] = {(int16_t)four[0], (int16_t)four[1], (int16_t)four[2], (int16_t)four[3]};
  memcpy(words, halves, sizeof halves);
}
inline void split_values(const int32_t* four, int32_t* words) { split_keys(four, words); }
inline void wide_keys(Wide& acc, const Bytes& codes, const int32_t* words) {
  int16_t word[4];
  memcpy(word, words, sizeof word);
  for (int i = 0; i < 4 * kLanes; ++i) acc.lane[i / 4] += codes.byte[i] * word[i % 4];
}
inline Bytes wide_value_codes(const Bytes& codes) { return codes; }
inline void wide_values(Wide& acc, const Bytes& codes, const int32_t* words) { wide_keys(acc, codes, words); }
inline Floats wide_total(const Wide& acc) { return dot_total(acc); }

constexpr bool kSignedValues = true;
inline void store_weights(uint8_t* p, const Floats& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = (uint8_t)lrintf(x.lane[i]);
}
inline void store_ints(int32_t* p, const Floats& x) {
  for (int i = 0; i < kLanes; ++i) p[i] = (int32_t)lrintf(x.lane[i]);
}
inline void prefetch(const void*) {}


// Bytes of two rows in each 16-bit lane: their sums, see lut.inc.
template <class Function>
inline Bytes by_word(Function function) {
  uint16_t words[2 * kLanes];
  for (int i = 0; i < 2 * kLanes; ++i) words[i] = (uint16_t)function(i);
  Bytes x;
  memcpy(x.byte, words, sizeof words);
  return x;
}
inline int word(const Bytes& x, int i) { return x.byte[2 * i] | x.byte[2 * i + 1] << 8; }
inline Bytes zero_bytes() { return {}; }
inline Bytes add_words(const Bytes& a, const Bytes& b) {
  return by_word([&](int i) { return word(a, i) + word(b, i); });
}
inline Bytes add_odd_bytes(const Bytes& sum, const Bytes& x) {
  return by_word([&](int i) { return word(sum, i) + x.byte[2 * i + 1]; });
}
inline Bytes even_bytes(const Bytes& all, const Bytes& odd) {
  return by_word([&](int i) { return word(all, i) - (word(odd, i) << 8); });
}
inline void words_to_floats(const Bytes& words, int less, Floats* out) {
  for (int half = 0; half < 2; ++half) {
    out[half] = by_lane([&](int i) { return (float)(int16_t)(word(words, half * kLanes + i) - less); });
  }
}
constexpr int kMostLutRows = 2;
constexpr int kLutRowsAtOnce = 2;

// Signs as unsigned levels, and levels times signed bytes, see bytes.inc.
constexpr int kMostLevel = 255;
constexpr int kByteRowsAtOnce = 2, kByteVectors = 4;
inline void store_bytes(uint8_t* p, const Bytes& x) { memcpy(p, x.byte, sizeof x.byte); }
inline Bytes four_times(const Floats& x) {
  return by_byte([&](int i) { return (uint8_t)lrintf(x.lane[i / 4]); });
}
inline Bytes bits_of_nibble(int nibble) {
  return by_byte([&](int i) { return 1 << (4 * nibble + i % 4); });
}
// byte 2 i + kHalf of 32 at all four bytes of lane i
template <int kHalf>
inline Bytes spread_rows(const uint8_t* p) {
  return by_byte([&](int i) { return p[i / 4 * 2 + kHalf]; });
}
// sum + level, where a bit is set
inline Bytes add_where(const Bytes& sum, const Bytes& signs, const Bytes& bits, const Bytes& level) {
  return by_byte([&](int i) { return sum.byte[i] + (signs.byte[i] & bits.byte[i] ? level.byte[i] : 0); });
}
using LevelSum = Ints;
inline LevelSum zero_level_sum() { return {}; }
inline Bytes broadcast_four(const uint8_t* p) {
  return by_byte([&](int i) { return p[i % 4]; });
}
inline void add_products(LevelSum& acc, const Bytes& levels, const Bytes& numbers) {
  for (int i = 0; i < 4 * kLanes; ++i) acc.lane[i / 4] += levels.byte[i] * (int8_t)numbers.byte[i];
}
inline Floats level_total(const LevelSum& acc) { return dot_total(acc); }

#include "half.inc"
inline Floats from_half(const uint16_t* p) { return by_lane([&](int i) { return half_to_float(p[i]); }); }
#include "transform.inc"
#include "attend.inc"
#include "pack.inc"
#include "score.inc"
#include "inputs.inc"
#include "lut.inc"
#include "bytes.inc"

}  // namespace

extern const Kernels kernels_scalar = MIKV_KERNELS("scalar");

}  // namespace mikv
