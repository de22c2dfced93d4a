// AVX2 with FMA and F16C: half a quad per register; bytes are multiplied and added in pairs into 16 bits, which hold the
// sum of `kRun` such products before they are widened.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "../kernels.h"
#include "../matmul.h"

namespace mikv {
namespace {

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;
using Bytes = __m256i;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline Floats broadcast(float x) { return _mm256_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline float reduce_add(Floats x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}
inline float reduce_max(Floats x) {
  __m128 half = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_max_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
}
inline Floats from_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats to_float(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Floats round_to_int(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Floats scale_by_power(Floats x, Floats exponent) {
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(
                              _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127)), 23)));
}
inline Floats first_lanes(int count, Floats x, Floats other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_blendv_ps(other, x, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane)));
}

inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes low_nibbles(Bytes x) { return _mm256_and_si256(x, _mm256_set1_epi8(0x0f)); }
inline Bytes high_nibbles(Bytes x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
inline Bytes spare_bits(Bytes a, Bytes b, Bytes c) {
  const Bytes spare = _mm256_set1_epi8((char)0x88);
  const Bytes ab = _mm256_or_si256(_mm256_srli_epi16(_mm256_and_si256(a, spare), 3),
                                   _mm256_srli_epi16(_mm256_and_si256(b, spare), 2));
  return _mm256_or_si256(ab, _mm256_srli_epi16(_mm256_and_si256(c, spare), 1));
}
inline Bytes table(const uint8_t* entries) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)entries));
}
inline Bytes lookup(Bytes entries, Bytes index) { return _mm256_shuffle_epi8(entries, index); }

// GCC reorders integer additions across accumulators and then spills them; an empty statement after each pins them.
inline Ints pinned(Ints x) {
  asm("" : "+x"(x));
  return x;
}
inline Ints widened(Ints acc, Ints pairs) {
  return pinned(_mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
}
using Dot = Ints;
inline Dot zero_dot() { return zero_ints(); }
inline Floats dot_total(const Dot& acc) { return to_float(acc); }
template <int kRun>
inline Ints sum_of_products(Ints acc, Ints p0, Ints p1, Ints p2, Ints p3) {
  if (kRun >= 4) return widened(acc, _mm256_add_epi16(_mm256_add_epi16(p0, p1), _mm256_add_epi16(p2, p3)));
  return widened(widened(acc, _mm256_add_epi16(p0, p1)), _mm256_add_epi16(p2, p3));
}
template <int kRun>
inline void dot_keys(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  acc = sum_of_products<kRun>(acc, _mm256_maddubs_epi16(quads[0], _mm256_set1_epi32(words[0])),
                               _mm256_maddubs_epi16(quads[1], _mm256_set1_epi32(words[1])),
                               _mm256_maddubs_epi16(quads[2], _mm256_set1_epi32(words[2])),
                               _mm256_maddubs_epi16(quads[3], _mm256_set1_epi32(words[3])));
}
template <int kRun>
inline void dot_values(Dot& acc, const Bytes (&quads)[4], const int32_t* words) {
  acc = sum_of_products<kRun>(acc, _mm256_maddubs_epi16(_mm256_set1_epi32(words[0]), quads[0]),
                               _mm256_maddubs_epi16(_mm256_set1_epi32(words[1]), quads[1]),
                               _mm256_maddubs_epi16(_mm256_set1_epi32(words[2]), quads[2]),
                               _mm256_maddubs_epi16(_mm256_set1_epi32(words[3]), quads[3]));
}

// 16-bit words against 8-bit codes: bytes 0 and 2 of a quad are one pair of 16-bit numbers, bytes 1 and 3 the other
constexpr int kWideMax = 16383;
constexpr int kWideValueBias = 0;
using Wide = Ints;
inline Wide zero_wide() { return zero_ints(); }
inline void split_keys(const int32_t* four, int32_t* words) {
  words[0] = (int32_t)((uint32_t)(four[0] & 0xffff) | (uint32_t)four[2] << 16);
  words[1] = (int32_t)((uint32_t)(four[1] & 0xffff) | (uint32_t)four[3] << 16);
}
inline void split_values(const int32_t* four, int32_t* words) { split_keys(four, words); }
inline void wide_keys(Wide& acc, Bytes codes, const int32_t* words) {
  const Ints even = _mm256_and_si256(codes, _mm256_set1_epi16(0x00ff)), odd = _mm256_srli_epi16(codes, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, _mm256_set1_epi32(words[0])));
  acc = pinned(_mm256_add_epi32(acc, _mm256_madd_epi16(odd, _mm256_set1_epi32(words[1]))));
}
inline Bytes wide_value_codes(Bytes codes) { return codes; }
inline void wide_values(Wide& acc, Bytes codes, const int32_t* words) { wide_keys(acc, codes, words); }
inline Floats wide_total(const Wide& acc) { return to_float(acc); }

constexpr bool kSignedValues = true;
inline void store_weights(uint8_t* p, Floats x) {
  const __m256i ints = _mm256_cvtps_epi32(x);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(ints), _mm256_extracti128_si256(ints, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(words, words));
}
inline void store_ints(int32_t* p, Floats x) { _mm256_storeu_si256((__m256i*)p, _mm256_cvtps_epi32(x)); }
// into the second-level cache: the first has too few places for what memory still owes
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }


// Bytes of two rows in each 16-bit lane: their sums, see lut.inc.
inline Bytes zero_bytes() { return _mm256_setzero_si256(); }
inline Bytes add_words(Bytes a, Bytes b) { return _mm256_add_epi16(a, b); }
inline Bytes add_odd_bytes(Bytes sum, Bytes x) { return _mm256_add_epi16(sum, _mm256_srli_epi16(x, 8)); }
inline Bytes even_bytes(Bytes all, Bytes odd) { return _mm256_sub_epi16(all, _mm256_slli_epi16(odd, 8)); }
inline void words_to_floats(Bytes words, int less, Floats* out) {
  const Bytes numbers = _mm256_sub_epi16(words, _mm256_set1_epi16((int16_t)less));
  out[0] = to_float(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(numbers)));
  out[1] = to_float(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(numbers, 1)));
}
constexpr int kMostLutRows = 7;
constexpr int kLutRowsAtOnce = 2;

// Signs as unsigned levels, and levels times signed bytes, see bytes.inc. Pairs of products fit into 16 bits.
constexpr int kMostLevel = 127;
constexpr int kByteRowsAtOnce = 2, kByteVectors = 4;
inline void store_bytes(uint8_t* p, Bytes x) { _mm256_storeu_si256((__m256i*)p, x); }
inline Bytes four_times(Floats x) { return _mm256_mullo_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(0x01010101)); }
inline Bytes bits_of_nibble(int nibble) { return _mm256_set1_epi32(nibble ? (int)0x80402010 : 0x08040201); }
// byte 2 i + kHalf of 16 at all four bytes of lane i
template <int kHalf>
inline Bytes spread_rows(const uint8_t* p) {
  const __m256i pairs = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  const __m256i places = _mm256_setr_epi8(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6,  //
                                          8, 8, 8, 8, 10, 10, 10, 10, 12, 12, 12, 12, 14, 14, 14, 14);
  return _mm256_shuffle_epi8(pairs, _mm256_add_epi8(places, _mm256_set1_epi8(kHalf)));
}
// sum + level, where a bit is set
inline Bytes add_where(Bytes sum, Bytes signs, Bytes bits, Bytes level) {
  const Bytes mask = _mm256_cmpeq_epi8(_mm256_and_si256(signs, bits), bits);
  return _mm256_add_epi8(sum, _mm256_and_si256(mask, level));
}
using LevelSum = Ints;
inline LevelSum zero_level_sum() { return zero_ints(); }
inline Bytes broadcast_four(const uint8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}
inline void add_products(LevelSum& acc, Bytes levels, Bytes numbers) {
  acc = widened(acc, _mm256_maddubs_epi16(levels, numbers));
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

extern const Kernels kernels_avx2 = MIKV_KERNELS("avx2");

}  // namespace mikv
