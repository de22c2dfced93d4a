// AVX-512 with VNNI: one register is one quad of a unit, vpdpbusd multiplies and adds 64 bytes at once.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "../kernels.h"
#include "../matmul.h"

namespace mikv {
namespace {

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline Floats broadcast(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline float reduce_add(Floats x) { return _mm512_reduce_add_ps(x); }
inline float reduce_max(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats from_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats to_float(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Floats round_to_int(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats scale_by_power(Floats x, Floats exponent) {
  return _mm512_mul_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(
                              _mm512_add_epi32(_mm512_cvtps_epi32(exponent), _mm512_set1_epi32(127)), 23)));
}
// `x` in the first `count` lanes, `other` in the rest
inline Floats first_lanes(int count, Floats x, Floats other) {
  return _mm512_mask_blend_ps((__mmask16)((1u << count) - 1), other, x);
}

inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_nibbles(Bytes x) { return _mm512_and_si512(x, _mm512_set1_epi8(0x0f)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
// bits 3 and 7 of three vectors as numbers of 3 bits in the low and high nibbles
inline Bytes spare_bits(Bytes a, Bytes b, Bytes c) {
  const Bytes spare = _mm512_set1_epi8((char)0x88);
  const Bytes ab = _mm512_or_si512(_mm512_srli_epi16(_mm512_and_si512(a, spare), 3),
                                   _mm512_srli_epi16(_mm512_and_si512(b, spare), 2));
  return _mm512_or_si512(ab, _mm512_srli_epi16(_mm512_and_si512(c, spare), 1));
}
inline Bytes table(const uint8_t* entries) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)entries)); }
inline Bytes lookup(Bytes entries, Bytes index) { return _mm512_shuffle_epi8(entries, index); }

// acc + quads . words over 4 quads; keys: unsigned quads and signed words, values: the other way round. Two sums, because
// vpdpbusd takes 5 cycles and a few rows alone would wait for each other.
struct Dot {
  Ints even, odd;
};
inline Dot zero_dot() { return {zero_ints(), zero_ints()}; }
inline Floats dot_total(const Dot& acc) { return to_float(_mm512_add_epi32(acc.even, acc.odd)); }
template <int kRun>
inline void dot_keys(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  acc.even = _mm512_dpbusd_epi32(acc.even, quads[0], _mm512_set1_epi32(words[0]));
  acc.odd = _mm512_dpbusd_epi32(acc.odd, quads[1], _mm512_set1_epi32(words[1]));
  acc.even = _mm512_dpbusd_epi32(acc.even, quads[2], _mm512_set1_epi32(words[2]));
  acc.odd = _mm512_dpbusd_epi32(acc.odd, quads[3], _mm512_set1_epi32(words[3]));
}
template <int kRun>
inline void dot_values(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  acc.even = _mm512_dpbusd_epi32(acc.even, _mm512_set1_epi32(words[0]), quads[0]);
  acc.odd = _mm512_dpbusd_epi32(acc.odd, _mm512_set1_epi32(words[1]), quads[1]);
  acc.even = _mm512_dpbusd_epi32(acc.even, _mm512_set1_epi32(words[2]), quads[2]);
  acc.odd = _mm512_dpbusd_epi32(acc.odd, _mm512_set1_epi32(words[3]), quads[3]);
}

// 16-bit words against 8-bit codes: word = 256 * high + low, each a byte
constexpr int kWideMax = 32512;
constexpr int kWideValueBias = 128;  // what is subtracted from a code before it is multiplied
struct Wide {
  Ints high, low;
};
inline Wide zero_wide() { return {zero_ints(), zero_ints()}; }
inline void split_keys(const int32_t* four, int32_t* words) {
  int8_t high[4], low[4];
  for (int i = 0; i < 4; ++i) {
    high[i] = (int8_t)((four[i] + 128) >> 8);
    low[i] = (int8_t)(four[i] - 256 * high[i]);
  }
  memcpy(words, high, 4);
  memcpy(words + 1, low, 4);
}
inline void split_values(const int32_t* four, int32_t* words) {
  uint8_t high[4], low[4];
  for (int i = 0; i < 4; ++i) high[i] = (uint8_t)(four[i] >> 8), low[i] = (uint8_t)four[i];
  memcpy(words, high, 4);
  memcpy(words + 1, low, 4);
}
inline void wide_keys(Wide& acc, Bytes codes, const int32_t* words) {
  acc.high = _mm512_dpbusd_epi32(acc.high, codes, _mm512_set1_epi32(words[0]));
  acc.low = _mm512_dpbusd_epi32(acc.low, codes, _mm512_set1_epi32(words[1]));
}
inline Bytes wide_value_codes(Bytes codes) { return _mm512_xor_si512(codes, _mm512_set1_epi8((char)0x80)); }
inline void wide_values(Wide& acc, Bytes codes, const int32_t* words) {
  acc.high = _mm512_dpbusd_epi32(acc.high, _mm512_set1_epi32(words[0]), codes);
  acc.low = _mm512_dpbusd_epi32(acc.low, _mm512_set1_epi32(words[1]), codes);
}
inline Floats wide_total(const Wide& acc) { return fma(to_float(acc.high), broadcast(256.0f), to_float(acc.low)); }

constexpr bool kSignedValues = true;
// non-negative floats up to 255 to bytes, rounded
inline void store_weights(uint8_t* p, Floats x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x)));
}
inline void store_ints(int32_t* p, Floats x) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(x)); }
// into the second-level cache: the first has too few places for what memory still owes
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }


// Bytes of two rows in each 16-bit lane: their sums, see lut.inc.
inline Bytes zero_bytes() { return _mm512_setzero_si512(); }
inline Bytes add_words(Bytes a, Bytes b) { return _mm512_add_epi16(a, b); }
inline Bytes add_odd_bytes(Bytes sum, Bytes x) { return _mm512_add_epi16(sum, _mm512_srli_epi16(x, 8)); }
inline Bytes even_bytes(Bytes all, Bytes odd) { return _mm512_sub_epi16(all, _mm512_slli_epi16(odd, 8)); }
inline void words_to_floats(Bytes words, int less, Floats* out) {
  const Bytes numbers = _mm512_sub_epi16(words, _mm512_set1_epi16((int16_t)less));
  out[0] = to_float(_mm512_cvtepi16_epi32(_mm512_castsi512_si256(numbers)));
  out[1] = to_float(_mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(numbers, 1)));
}
constexpr int kMostLutRows = 3;
constexpr int kLutRowsAtOnce = 4;

// Signs as unsigned levels, and levels times signed bytes, see bytes.inc.
constexpr int kMostLevel = 255;
constexpr int kByteRowsAtOnce = 6, kByteVectors = 4;
inline void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
inline Bytes four_times(Floats x) { return _mm512_mullo_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(0x01010101)); }
inline Bytes bits_of_nibble(int nibble) { return _mm512_set1_epi32(nibble ? (int)0x80402010 : 0x08040201); }
// byte 2 i + kHalf of 32 at all four bytes of lane i
template <int kHalf>
inline Bytes spread_rows(const uint8_t* p) {
  const __m512i pairs = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                 _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)));
  const __m128i places = _mm_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  return _mm512_shuffle_epi8(pairs, _mm512_broadcast_i32x4(_mm_add_epi8(places, _mm_set1_epi8(kHalf))));
}
// sum + level, where a bit is set
inline Bytes add_where(Bytes sum, Bytes signs, Bytes bits, Bytes level) {
  return _mm512_mask_add_epi8(sum, _mm512_test_epi8_mask(signs, bits), sum, level);
}
using LevelSum = Ints;
inline LevelSum zero_level_sum() { return zero_ints(); }
inline Bytes broadcast_four(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
// GCC moves sums from register to register and then spills them; an empty statement after each pins them.
inline void add_products(LevelSum& acc, Bytes levels, Bytes numbers) {
  acc = _mm512_dpbusd_epi32(acc, levels, numbers);
  asm("" : "+v"(acc));
}
inline Floats level_total(const LevelSum& acc) { return to_float(acc); }

#include "half.inc"
#include "transform.inc"
#include "attend.inc"
#include "pack.inc"
#include "score.inc"
#include "inputs.inc"
#include "lut.inc"
#include "bytes.inc"

}  // namespace

extern const Kernels kernels_avx512 = MIKV_KERNELS("avx512");

}  // namespace mikv
