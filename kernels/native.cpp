// fxgrow.kernels, CPU backend: one tensor (or shard) of a growth plan, source read once, destination written once.
//
// A destination is rows (up to three outer dims) of columns. Columns are cut into segments, runs of virtual columns with
// one multiplicity; a strip of a segment is made in the first-level cache and streamed to every place it goes. Values
// equal kernels/reference.py to the bit: same integers, same order of float operations, no fused multiply-adds.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using i64 = int64_t;
using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;

enum Fill : u8 { ZERO = 0, RANDOM = 1, MEAN = 2, CONSTANT = 3, OLD = 255 };
enum Purpose : u32 { SPLIT = 0, PAIR = 1, INDEPENDENT = 2, RANDOM_FILL = 3 };
enum Type : int { F32 = 0, BF16 = 1, F16 = 2, F64 = 3 };

// ---- what Python hands over; kernels/native.py mirrors these structures field by field ----

struct Outer {
  i64 groups;            // virtual units with at least one local entry, in source order
  const i64* unit;       // (groups,) virtual coordinate
  const i64* start;      // (groups + 1,) into entry and leaf
  const i64* entry;      // local destination coordinate
  const i64* leaf;       // position within the group's tree
  const u8* code;        // (groups,) fill code
  const i64* shape;      // (groups,) group size if the group is split, 0 if plain
  const double* lean;    // leans of the group's cuts, preorder; at lean + lean_at[g]
  const i64* lean_at;    // (groups,)
  const i64* paired;     // (groups,) group size if its newborn entries get (+z, -z), else 0; null: none
  const double* scale;   // per local entry, or null
  const u8* copy;        // per local entry: a copy and not the first, or null
  i64 source_stride, target_stride;  // in elements
  i64 virtual_linear, split_linear, target_linear;  // strides of the three linear indices
  i64 offset;            // global coordinate of local entry 0
};

struct Segment {
  i64 first, count;      // virtual columns [first, first + count), or positions in units
  const i64* units;      // (count,) virtual columns, or null
  i64 leaves;            // destinations per column (group size when split)
  i64 split;             // 1: cut by a tree; 0: plain copies
  i64 paired;            // 1: newborn (+z, -z) pairs
  i64 code;
  const i64* base;       // (leaves,) local destination column of the first column, -1: not in this shard
  i64 step;              // destination columns per virtual column
  const i64* scatter;    // (leaves, count) destination columns, -1: not here; or null
  const double* lean;    // (leaves - 1,) leans, or (leaves - 1, count) if lean_step is 1
  i64 lean_step;
  const double* scale;   // (count,) or null
};

struct Cuts {            // the tree of groups of one size, preorder
  i64 leaves;
  const i64* node;       // (leaves - 1,)
  const i64* lo;
  const i64* mid;
  const double* spread;  // times amplitude: from a raw draw to noise
};

struct Task {
  const void* source;
  void* target;
  i64 source_type, target_type, item_bytes;  // item_bytes > 0: bits are copied, types do not matter
  Outer outer[3];
  i64 rows_outer;        // number of outer dims in use (leading entries of outer)
  i64 segments;
  const Segment* segment;
  i64 column_source_stride;
  i64 columns;           // local
  i64 column_offset;     // global coordinate of local column 0
  const u8* column_copy;
  const Cuts* cut;
  i64 split_outer;       // outer dim that is split, or -1
  double scale, constant, random_amplitude, pair_amplitude, independent_amplitude;
  i64 tree_noise, pair_noise, independent;
  i64 distribution;
  u32 noise_key[2], random_key[2];
  const void* means[16]; // per set of mean dims (bit d of the set: outer d, bit 3: columns), in the compute type
  i64 mean_stride[16][4];
  i64 stream, threads;
  u64 constant_bits[2];
};

constexpr int STRIP = 512;  // columns of a strip: a few buffers of it fit the first-level cache
constexpr int WIDE = 16 * STRIP;

// ---- Philox 4x32-10 ----

constexpr u32 M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;

inline void philox_quad(u32* out, u64 quad, u32 node, u32 purpose, u32 k0, u32 k1) {
  u32 c0 = u32(quad), c1 = u32(quad >> 32), c2 = node, c3 = purpose;
  for (int r = 0; r < 10; ++r) {
    u64 p0 = u64(c0) * M0, p1 = u64(c2) * M1;
    c0 = u32(p1 >> 32) ^ c1 ^ k0;
    c1 = u32(p1);
    c2 = u32(p0 >> 32) ^ c3 ^ k1;
    c3 = u32(p0);
    k0 += W0;
    k1 += W1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

inline float bits_float(u32 u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline u32 float_bits(float f) {
  u32 u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline double bits_double(u64 u) {
  double f;
  std::memcpy(&f, &u, 8);
  return f;
}
inline u64 double_bits(double f) {
  u64 u;
  std::memcpy(&u, &f, 8);
  return u;
}

inline float log_unit(float y) {  // Cephes logf on (0, 1]
  u32 bits = float_bits(y);
  float exponent = float(i64(int(bits >> 23) - 126) == 0 ? 0 : int(bits >> 23) - 126);
  float m = bits_float((bits & 0x007FFFFFu) | 0x3F000000u);
  const bool low = m < 0.70710677f;
  exponent = low ? exponent - 1.0f : exponent;
  m = (low ? m + m : m) - 1.0f;
  const float z = m * m;
  float p = 7.0376836292e-2f;
  p = p * m + -1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m + -1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m + -1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m + -2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z;
  p = p + exponent * -2.12194440e-4f;
  p = p - z * 0.5f;
  return (m + p) + exponent * 0.693359375f;
}

template <int DISTRIBUTION>
inline float draw(u32 word) {
  if (DISTRIBUTION == 0) {
    const u32 pairs = (word & 0x00FF00FFu) + ((word >> 8) & 0x00FF00FFu);
    return float(int((pairs & 0xFFFFu) + (pairs >> 16)) - 510);
  }
  if (DISTRIBUTION == 2) return 1.0f - float(int(word >> 31)) * 2.0f;
  const float x = float(int((word >> 8) * 2u) + (1 - (1 << 24))) * 0x1p-24f;
  const float w = -log_unit((1.0f - x) * (1.0f + x));
  const float c = w - 2.5f, t = std::sqrt(w) - 3.0f;
  float p = 2.81022636e-08f;
  p = p * c + 3.43273939e-07f;
  p = p * c + -3.5233877e-06f;
  p = p * c + -4.39150654e-06f;
  p = p * c + 0.00021858087f;
  p = p * c + -0.00125372503f;
  p = p * c + -0.00417768164f;
  p = p * c + 0.246640727f;
  p = p * c + 1.50140941f;
  float q = -0.000200214257f;
  q = q * t + 0.000100950558f;
  q = q * t + 0.00134934322f;
  q = q * t + -0.00367342844f;
  q = q * t + 0.00573950773f;
  q = q * t + -0.0076224613f;
  q = q * t + 0.00943887047f;
  q = q * t + 1.00167406f;
  q = q * t + 2.83297682f;
  return (w < 5.0f ? p : q) * x;
}

#if defined(__AVX512F__)
inline __m512i byte_draws(__m512i words) {
#if defined(__AVX512VNNI__)
  const __m512i sum = _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), words, _mm512_set1_epi8(1));
#else
  const __m512i mask = _mm512_set1_epi32(0x00FF00FF);
  const __m512i pairs = _mm512_add_epi32(_mm512_and_si512(words, mask), _mm512_and_si512(_mm512_srli_epi32(words, 8), mask));
  const __m512i low = _mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(low, _mm512_srli_epi32(pairs, 16)), _mm512_set1_epi32(-510));
#endif
  return _mm512_castps_si512(_mm512_cvtepi32_ps(sum));
}
#endif

// The words of values [linear, linear + count), or, with BYTES, the float draws `sum of bytes - 510` made of them.
// out has room for count + SLACK. Returns where the first one lies.
constexpr int SLACK = 192;
template <bool BYTES>
const u32* generate(u32* out, u64 linear, int count, u32 node, u32 purpose, const u32* key) {
  u64 quad = linear >> 2;
  const int lane = int(linear & 3), quads = (lane + count + 3) >> 2;
  int i = 0;
#if defined(__AVX512F__)
  // 64-bit lanes: the 32-bit product needs no masking, and garbage in the upper halves is never read
  const __m512i m0 = _mm512_set1_epi64(M0), m1 = _mm512_set1_epi64(M1);
  const __m512i order_lo = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), order_hi = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  constexpr int V = 4;  // vectors in flight: hides the latency of the multiplier
  for (; i < quads; i += 8 * V) {
    __m512i c0[V], c1[V], c2[V], c3[V];
    for (int v = 0; v < V; ++v) {
      c0[v] = _mm512_add_epi64(_mm512_set1_epi64(i64(quad + i + 8 * v)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
      c1[v] = _mm512_srli_epi64(c0[v], 32);
      c2[v] = _mm512_set1_epi64(node);
      c3[v] = _mm512_set1_epi64(purpose);
    }
    u32 k0 = key[0], k1 = key[1];
    for (int r = 0; r < 10; ++r) {
      const __m512i kk0 = _mm512_set1_epi64(k0), kk1 = _mm512_set1_epi64(k1);
      for (int v = 0; v < V; ++v) {
        const __m512i p0 = _mm512_mul_epu32(c0[v], m0), p1 = _mm512_mul_epu32(c2[v], m1);
        c0[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), c1[v], kk0, 0x96);
        c2[v] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), c3[v], kk1, 0x96);
        c1[v] = p1;
        c3[v] = p0;
      }
      k0 += W0;
      k1 += W1;
    }
    for (int v = 0; v < V; ++v) {
      const __m512i a = _mm512_mask_blend_epi32(0xAAAA, c0[v], _mm512_slli_epi64(c1[v], 32));
      const __m512i b = _mm512_mask_blend_epi32(0xAAAA, c2[v], _mm512_slli_epi64(c3[v], 32));
      const __m512i even = _mm512_unpacklo_epi64(a, b), odd = _mm512_unpackhi_epi64(a, b);
      __m512i x = _mm512_permutex2var_epi64(even, order_lo, odd), y = _mm512_permutex2var_epi64(even, order_hi, odd);
      if (BYTES) x = byte_draws(x), y = byte_draws(y);
      _mm512_storeu_si512(out + 4 * (i + 8 * v), x);
      _mm512_storeu_si512(out + 4 * (i + 8 * v) + 16, y);
    }
  }
#elif defined(__AVX2__)
  const __m256i m0 = _mm256_set1_epi64x(M0), m1 = _mm256_set1_epi64x(M1);
  constexpr int V = 2;
  for (; i < quads; i += 4 * V) {
    __m256i c0[V], c1[V], c2[V], c3[V];
    for (int v = 0; v < V; ++v) {
      c0[v] = _mm256_add_epi64(_mm256_set1_epi64x(i64(quad + i + 4 * v)), _mm256_setr_epi64x(0, 1, 2, 3));
      c1[v] = _mm256_srli_epi64(c0[v], 32);
      c2[v] = _mm256_set1_epi64x(node);
      c3[v] = _mm256_set1_epi64x(purpose);
    }
    u32 k0 = key[0], k1 = key[1];
    for (int r = 0; r < 10; ++r) {
      const __m256i kk0 = _mm256_set1_epi64x(k0), kk1 = _mm256_set1_epi64x(k1);
      for (int v = 0; v < V; ++v) {
        const __m256i p0 = _mm256_mul_epu32(c0[v], m0), p1 = _mm256_mul_epu32(c2[v], m1);
        c0[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), c1[v]), kk0);
        c2[v] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), c3[v]), kk1);
        c1[v] = p1;
        c3[v] = p0;
      }
      k0 += W0;
      k1 += W1;
    }
    for (int v = 0; v < V; ++v) {
      const __m256i a = _mm256_blend_epi32(c0[v], _mm256_slli_epi64(c1[v], 32), 0xAA);
      const __m256i b = _mm256_blend_epi32(c2[v], _mm256_slli_epi64(c3[v], 32), 0xAA);
      const __m256i even = _mm256_unpacklo_epi64(a, b), odd = _mm256_unpackhi_epi64(a, b);
      _mm256_storeu_si256((__m256i*)(out + 4 * (i + 4 * v)), _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256((__m256i*)(out + 4 * (i + 4 * v) + 8), _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
#else
  for (; i < quads; ++i) philox_quad(out + 4 * i, quad + i, node, purpose, key[0], key[1]);
#endif
#if !defined(__AVX512F__)
  if (BYTES)
    for (int k = 0; k < 4 * quads; ++k) out[k] = float_bits(draw<0>(out[k]));
#endif
  return out + lane;
}

// The float draws of values [linear, linear + count).
const float* draws(u32* out, i64 distribution, u64 linear, int count, u32 node, u32 purpose, const u32* key) {
  if (distribution == 0) return reinterpret_cast<const float*>(generate<true>(out, linear, count, node, purpose, key));
  u32* w = const_cast<u32*>(generate<false>(out, linear, count, node, purpose, key));
  if (distribution == 1)
    for (int i = 0; i < count; ++i) w[i] = float_bits(draw<1>(w[i]));
  else
    for (int i = 0; i < count; ++i) w[i] = float_bits(draw<2>(w[i]));
  return reinterpret_cast<const float*>(w);
}

float draw_one(i64 distribution, u64 linear, u32 node, u32 purpose, const u32* key) {
  u32 quad[4];
  philox_quad(quad, linear >> 2, node, purpose, key[0], key[1]);
  const u32 w = quad[linear & 3];
  return distribution == 0 ? draw<0>(w) : distribution == 1 ? draw<1>(w) : draw<2>(w);
}

// ---- element types: the value v in the compute type, rounded to the type, and its bits ----

struct AsF32 {
  using compute = float;
  using bits = u32;
  static constexpr u32 SIGN = 0x80000000u;
  static inline u32 bits_compute(float v) { return float_bits(v); }
  static inline float load_compute(u32 b) { return bits_float(b); }
  static inline float round(float v) { return v; }
  static inline float round_finite(float v) { return v; }
  static inline u32 store(float v) { return float_bits(v); }
  static inline float load(u32 b) { return bits_float(b); }
};
struct AsF64 {
  using compute = double;
  using bits = u64;
  static constexpr u64 SIGN = 0x8000000000000000ull;
  static inline u64 bits_compute(double v) { return double_bits(v); }
  static inline double load_compute(u64 b) { return bits_double(b); }
  static inline double round(double v) { return v; }
  static inline double round_finite(double v) { return v; }
  static inline u64 store(double v) { return double_bits(v); }
  static inline double load(u64 b) { return bits_double(b); }
};
struct AsBF16 {
  using compute = float;
  using bits = u16;
  static constexpr u32 SIGN = 0x80000000u;
  static inline u32 bits_compute(float v) { return float_bits(v); }
  static inline float load_compute(u32 b) { return bits_float(b); }
  static inline float round(float v) { return v != v ? bits_float(0x7FC00000u) : round_finite(v); }
  static inline float round_finite(float v) {
    const u32 u = float_bits(v);
    return bits_float((u + 0x7FFFu + ((u >> 16) & 1u)) & 0xFFFF0000u);
  }
  static inline u16 store(float rounded) { return u16(float_bits(rounded) >> 16); }
  static inline float load(u16 b) { return bits_float(u32(b) << 16); }
};
struct AsF16 {
  using compute = float;
  using bits = u16;
  static constexpr u32 SIGN = 0x80000000u;
  static inline u32 bits_compute(float v) { return float_bits(v); }
  static inline float load_compute(u32 b) { return bits_float(b); }
  static inline float round(float v) {
    const u32 u = float_bits(v), sign = u & 0x80000000u, a = u & 0x7FFFFFFFu;
    const u32 r = (a + 0xFFFu + ((a >> 13) & 1u)) & 0xFFFFE000u;
    const float small = (bits_float(a) + 0.5f) - 0.5f;  // multiples of 2^-24
    u32 m = a < 0x38800000u ? float_bits(small) : r;
    m = m >= 0x47800000u ? 0x7F800000u : m;
    m = a > 0x7F800000u ? 0x7FC00000u : m;
    return bits_float(m | sign);
  }
  static inline float round_finite(float v) {  // of v >= 0 below infinity
    const u32 a = float_bits(v);
    const u32 r = (a + 0xFFFu + ((a >> 13) & 1u)) & 0xFFFFE000u;
    const float small = (v + 0.5f) - 0.5f;
    return a < 0x38800000u ? small : bits_float(r);
  }
  static inline u16 store(float rounded) {
    const u32 u = float_bits(rounded), sign = (u >> 16) & 0x8000u, a = u & 0x7FFFFFFFu;
    const u32 small = float_bits(bits_float(a) + 0.5f) - 0x3F000000u;
    u32 m = a < 0x38800000u ? small : (a >> 13) - (112u << 10);
    m = a >= 0x7F800000u ? (a > 0x7F800000u ? 0x7E00u : 0x7C00u) : m;
    return u16(m | sign);
  }
  static inline float load(u16 b) {
    const u32 a = u32(b & 0x7FFFu), sign = u32(b & 0x8000u) << 16;
    const u32 normal = (a << 13) + (112u << 23);
    const float small = bits_float((a << 13) + (113u << 23)) - bits_float(113u << 23);
    u32 m = a < 0x0400u ? float_bits(small) : normal;
    m = a >= 0x7C00u ? normal + (112u << 23) : m;
    return bits_float(m | sign);
  }
};

template <class S, class C>
void load_strip(C* x, const void* source, i64 at, i64 stride, const i64* units, int count) {
  const typename S::bits* s = static_cast<const typename S::bits*>(source) + at;
  if (units)
    for (int i = 0; i < count; ++i) x[i] = C(S::load(s[units[i] * stride]));
  else if (stride == 1)
    for (int i = 0; i < count; ++i) x[i] = C(S::load(s[i]));
  else
    for (int i = 0; i < count; ++i) x[i] = C(S::load(s[i * stride]));
}

template <class C>
void load_any(C* x, i64 type, const void* source, i64 at, i64 stride, const i64* units, int count) {
  switch (type) {
    case F32: return load_strip<AsF32, C>(x, source, at, stride, units, count);
    case BF16: return load_strip<AsBF16, C>(x, source, at, stride, units, count);
    case F16: return load_strip<AsF16, C>(x, source, at, stride, units, count);
    default: return load_strip<AsF64, C>(x, source, at, stride, units, count);
  }
}

// ---- stores ----

inline void put(void* to, const void* from, size_t bytes, bool stream) {
#if defined(__x86_64__)
  if (stream && bytes >= 256) {
    char* d = static_cast<char*>(to);
    const char* s = static_cast<const char*>(from);
    const size_t head = size_t(-reinterpret_cast<intptr_t>(d)) & 63;
    std::memcpy(d, s, head);
    d += head, s += head, bytes -= head;
    for (; bytes >= 64; bytes -= 64, d += 64, s += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(d), _mm512_loadu_si512(s));
#elif defined(__AVX__)
      _mm256_stream_si256((__m256i*)d, _mm256_loadu_si256((const __m256i*)s));
      _mm256_stream_si256((__m256i*)(d + 32), _mm256_loadu_si256((const __m256i*)(s + 32)));
#else
      for (int k = 0; k < 64; k += 16) _mm_stream_si128((__m128i*)(d + k), _mm_loadu_si128((const __m128i*)(s + k)));
#endif
    }
    std::memcpy(d, s, bytes);
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

struct Row {                // one destination row
  i64 source;               // element offset in the source
  i64 target;               // element offset in the destination
  i64 unit[3];
  double factor;
  u8 code;                  // combined over the outer dims
  int mean_set;             // outer dims whose fill is mean
  bool literal;             // an outer dim is randomly filled: values are not scaled
  u64 virtual_linear, split_linear, target_linear;
};

inline int rank(u8 code) { return code == ZERO ? 0 : code == CONSTANT ? 1 : code == MEAN ? 2 : code == RANDOM ? 3 : 4; }

// Leaves of one strip: (leaves, count) bits, ready to be stored to the columns of a segment in several rows.
template <class B>
void store_leaves(B* target, const B* const* leaf, const Segment& s, i64 a, int count, bool stream, B* scratch) {
  const i64 n = s.leaves;
  if (s.scatter) {
    for (i64 r = 0; r < n; ++r) {
      const i64* at = s.scatter + r * s.count + a;
      for (int i = 0; i < count; ++i)
        if (at[i] >= 0) target[at[i]] = leaf[r][i];
    }
    return;
  }
  if (s.step == 1) {
    for (i64 r = 0; r < n; ++r)
      if (s.base[r] >= 0) put(target + s.base[r] + a, leaf[r], size_t(count) * sizeof(B), stream);
    return;
  }
  bool interleaved = s.step == n && n <= 8;
  for (i64 r = 0; interleaved && r < n; ++r) interleaved = s.base[r] == s.base[0] + r;
  if (interleaved && s.base[0] >= 0) {
    const B* l0 = leaf[0];
    const B* l1 = leaf[1];
    for (int i = 0; i < count;) {  // scratch holds one strip
      const int part = std::min<int>(count - i, STRIP / int(n));
      if (n == 2)
        for (int k = 0; k < part; ++k) scratch[2 * k] = l0[i + k], scratch[2 * k + 1] = l1[i + k];
      else
        for (i64 r = 0; r < n; ++r)
          for (int k = 0; k < part; ++k) scratch[k * n + r] = leaf[r][i + k];
      put(target + s.base[0] + (a + i) * n, scratch, size_t(part) * n * sizeof(B), stream);
      i += part;
    }
    return;
  }
  for (i64 r = 0; r < n; ++r)
    if (s.base[r] >= 0)
      for (int i = 0; i < count; ++i) target[s.base[r] + (a + i) * s.step] = leaf[r][i];
}

template <class T>
class Machine {
  using C = typename T::compute;
  using B = typename T::bits;
  const Task& t;
  std::vector<C> values_;    // (leaves, STRIP)
  std::vector<B> stored_;    // (leaves, STRIP)
  std::vector<u32> words_;
  std::vector<u32> wide_;
  std::vector<const B*> pointers_;
  alignas(64) C base_[STRIP];
  alignas(64) float gathered_[STRIP];
  alignas(64) B scratch_[STRIP];
  alignas(64) C leans_[STRIP];

 public:
  explicit Machine(const Task& task) : t(task), words_(STRIP + SLACK) {}

  void reserve(i64 leaves) {
    if (i64(pointers_.size()) < leaves) {
      values_.resize(size_t(leaves) * STRIP + 16);
      stored_.resize(size_t(leaves) * STRIP + 64);
      pointers_.resize(size_t(leaves));
      for (i64 r = 0; r < leaves; ++r) pointers_[size_t(r)] = stored_.data() + r * STRIP;
    }
  }

  const float* noise(i64 distribution, u64 linear, const i64* units, int count, u32 node, Purpose purpose, const u32* key) {
    if (!units) return draws(words_.data(), distribution, linear, count, node, purpose, key);
    i64 lo = units[0], hi = units[0];
    for (int i = 1; i < count; ++i) lo = std::min(lo, units[i]), hi = std::max(hi, units[i]);
    if (hi - lo < WIDE && hi - lo < 16 * i64(count)) {
      wide_.resize(WIDE + SLACK);
      const float* all = draws(wide_.data(), distribution, linear + u64(lo), int(hi - lo + 1), node, purpose, key);
      for (int i = 0; i < count; ++i) gathered_[i] = all[units[i] - lo];
    } else {
      for (int i = 0; i < count; ++i) gathered_[i] = draw_one(distribution, linear + u64(units[i]), node, purpose, key);
    }
    return gathered_;
  }

  // scale · Π scale_d · virtual source, rounded to the destination type, for a strip of a segment
  void base(const Row& row, const Segment& s, i64 a, int count) {
    const u8 code = rank(row.code) <= rank(u8(s.code)) ? row.code : u8(s.code);
    const i64* units = s.units ? s.units + a : nullptr;
    const i64 first = s.units ? 0 : s.first + a;
    if (code == ZERO || code == CONSTANT) {
      const C value = code == ZERO ? C(0) : T::round(C(t.constant));
      std::fill_n(base_, count, value);
      return;
    }
    if (code == RANDOM) {
      const float* raw = noise(0, row.virtual_linear + u64(first), units, count, 0, RANDOM_FILL, t.random_key);
      const C amplitude = C(t.random_amplitude);
      for (int i = 0; i < count; ++i) base_[i] = T::round(C(raw[i]) * amplitude);
      return;
    }
    if (code == MEAN) {
      const int set = row.mean_set | (u8(s.code) == MEAN ? 8 : 0);
      const i64* stride = t.mean_stride[set];
      i64 at = 0;
      for (int d = 0; d < 3; ++d) at += row.unit[d] * stride[d];
      const C* table = static_cast<const C*>(t.means[set]) + at + first * stride[3];
      for (int i = 0; i < count; ++i) base_[i] = table[(units ? units[i] : i) * stride[3]];
    } else {
      load_any<C>(base_, t.source_type, t.source, row.source + first * t.column_source_stride, t.column_source_stride,
                  units, count);
    }
    if (!(row.literal || u8(s.code) == RANDOM)) {
      if (s.scale) {
        const double* scale = s.scale + a;
        for (int i = 0; i < count; ++i) base_[i] *= C(row.factor * scale[i]);
      } else if (row.factor != 1) {
        const C factor = C(row.factor);
        for (int i = 0; i < count; ++i) base_[i] *= factor;
      }
    }
    // source values of the destination's own type are rounded already
    if (code == MEAN || t.source_type != t.target_type || s.scale || row.factor != 1)
      for (int i = 0; i < count; ++i) base_[i] = T::round(base_[i]);
  }

  const Cuts* cuts(i64 leaves) const {
    const Cuts* c = t.cut;
    while (c->leaves != leaves) ++c;
    return c;
  }

  // Cut the base strip: leaves of `shape`-sized groups into values_, with signs.
  void cut(i64 shape, const double* lean, i64 lean_row, i64 lean_step, u64 linear, const i64* units, int count) {
    const Cuts* c = cuts(shape);
    C* v = values_.data();
    for (int i = 0; i < count; ++i) v[i] = std::fabs(base_[i]);
    for (i64 k = 0; k + 1 < shape; ++k) {
      C* left = v + c->lo[k] * STRIP;
      C* right = v + c->mid[k] * STRIP;
      const double* g = lean + k * lean_row;
      if (lean_step)
        for (int i = 0; i < count; ++i) leans_[i] = C(g[i]);
      const C spread = C(c->spread[k]);
      const bool even = !lean_step && g[0] == 0;
      if (t.tree_noise) {
        const float* raw = noise(t.distribution, linear, units, count, u32(c->node[k]), SPLIT, t.noise_key);
        const C *x = base_, *leans = leans_;
        if (even)
          halve(left, right, count, [=](int i, C) { return flip(C(raw[i]) * spread, x[i]); });
        else if (lean_step)
          halve(left, right, count, [=](int i, C w) { return leans[i] * w + flip(C(raw[i]) * spread, x[i]); });
        else
          halve(left, right, count, [=, l = C(g[0])](int i, C w) { return l * w + flip(C(raw[i]) * spread, x[i]); });
      } else if (lean_step) {
        const C* leans = leans_;
        halve(left, right, count, [=](int i, C w) { return leans[i] * w; });
      } else {
        halve(left, right, count, [l = C(g[0])](int, C w) { return l * w; });
      }
    }
    for (i64 r = 0; r < shape; ++r) {
      C* leaf = v + r * STRIP;
      for (int i = 0; i < count; ++i) leaf[i] = std::copysign(leaf[i], base_[i]);
    }
  }

  // e with its sign turned where `sign` is negative
  static inline C flip(C e, C sign) { return T::load_compute(T::bits_compute(e) ^ (T::bits_compute(sign) & T::SIGN)); }

  // The commonest cut, fused: even pairs, straight to their bits.
  template <bool NOISE>
  void pair(u64 linear, const i64* units, const Cuts* c, int count) {
    const C spread = C(c->spread[0]);
    const float* __restrict raw =
        NOISE ? noise(t.distribution, linear, units, count, u32(c->node[0]), SPLIT, t.noise_key) : nullptr;
    B* __restrict left = stored_.data();
    B* __restrict right = stored_.data() + STRIP;
    const C* __restrict base = base_;
    constexpr C INF = C(INFINITY);
    for (int i = 0; i < count; ++i) {
      const C x = base[i], w = std::fabs(x);
      const C m = NOISE ? flip(C(raw[i]) * spread, x) : C(0);
      C big = T::round_finite(w * C(0.5) + std::fabs(m));
      big = big < w ? big : w;
      C small = w - big;
      small = w < INF ? small : w;
      const bool swap = m < 0;
      left[i] = T::store(std::copysign(swap ? small : big, x));
      right[i] = T::store(std::copysign(swap ? big : small, x));
    }
  }

  // left, right = the halves of left: big = rn(w/2 + |m|), at most w; w - big is exact
  template <class F>
  static inline void halve(C* __restrict left, C* __restrict right, int count, F lean) {
    constexpr C INF = C(INFINITY);
    for (int i = 0; i < count; ++i) {
      const C w = left[i], m = lean(i, w);
      C big = T::round_finite(w * C(0.5) + std::fabs(m));
      big = big < w ? big : w;
      C small = w - big;
      small = w < INF ? small : w;
      const bool swap = m < 0;
      left[i] = swap ? small : big;
      right[i] = swap ? big : small;
    }
  }

  void convert(B* to, const C* from, int count) {
    for (int i = 0; i < count; ++i) to[i] = T::store(from[i]);
  }

  void pairs(i64 leaves, u64 linear, const i64* units, int count) {
    const C amplitude = C(t.pair_amplitude);
    for (i64 r = 0; r < leaves; ++r) std::fill_n(values_.data() + r * STRIP, count, C(0));
    for (i64 k = 0; k < leaves / 2; ++k) {
      const float* raw = noise(t.distribution, linear, units, count, u32(k + 1), PAIR, t.noise_key);
      C* plus = values_.data() + 2 * k * STRIP;
      C* minus = plus + STRIP;
      for (int i = 0; i < count; ++i) {
        const C z = T::round(C(raw[i]) * amplitude);
        plus[i] = z;
        minus[i] = -z;
      }
    }
  }

  // One strip of one segment, for all rows of an outer group that get the same values, or for one row.
  void strip(const Row& row, const Row* rows, i64 row_count, const Segment& s, i64 a, int count, i64 outer_group) {
    B* target = static_cast<B*>(t.target);
    base(row, s, a, count);
    const i64* units = s.units ? s.units + a : nullptr;
    if (outer_group >= 0) {  // an outer dim is split: rows are the leaves
      const Outer& o = t.outer[t.split_outer];
      const i64 shape = o.shape[outer_group];
      const bool paired = o.paired && o.paired[outer_group] > 0;
      const bool even = !paired && shape == 2 && o.lean[o.lean_at[outer_group]] == 0;
      const i64 from = o.start[outer_group], here = o.start[outer_group + 1] - from;
      const i64 leaves = paired ? o.paired[outer_group] : shape;
      reserve(std::max<i64>(leaves, 2));
      // noise goes by destination column; then the segment is one destination run
      const u64 linear = row.split_linear + u64(t.column_offset + (s.scatter ? 0 : s.base[0] + a));
      const bool addressed = t.tree_noise || paired;
      if (paired) pairs(leaves, linear, nullptr, count);
      else if (even && t.tree_noise) pair<true>(linear, nullptr, cuts(2), count);
      else if (even) pair<false>(0, nullptr, cuts(2), count);
      else cut(shape, o.lean + o.lean_at[outer_group], 1, 0, addressed ? linear : 0, nullptr, count);
      for (i64 k = 0; k < here; ++k) {
        B* bits = stored_.data() + o.leaf[from + k] * STRIP;
        if (!even) convert(bits, values_.data() + o.leaf[from + k] * STRIP, count);
        repeat(s.leaves, bits);
        for (i64 r = 0; r < row_count; ++r)
          store_leaves(target + rows[r].target + o.entry[from + k] * o.target_stride, repeated_.data(), s, a, count,
                       t.stream, scratch_);
      }
      return;
    }
    const i64 leaves = s.leaves;
    if (s.paired) {
      reserve(leaves);
      pairs(leaves, row.split_linear + u64(units ? 0 : s.first + a), units, count);
    } else if (s.split && leaves == 2 && !s.lean_step && s.lean[0] == 0) {
      reserve(2);
      const u64 linear = row.split_linear + u64(units ? 0 : s.first + a);
      if (t.tree_noise) pair<true>(linear, units, cuts(2), count);
      else pair<false>(linear, units, cuts(2), count);
      for (i64 k = 0; k < row_count; ++k)
        store_leaves(target + rows[k].target, pointers_.data(), s, a, count, t.stream, scratch_);
      return;
    } else if (s.split) {
      reserve(leaves);
      cut(leaves, s.lean + (s.lean_step ? a : 0), s.lean_step ? s.count : 1, s.lean_step,
          row.split_linear + u64(units ? 0 : s.first + a), units, count);
    } else {
      reserve(1);
      convert(stored_.data(), base_, count);
      repeat(leaves, stored_.data());
      for (i64 k = 0; k < row_count; ++k)
        store_leaves(target + rows[k].target, repeated_.data(), s, a, count, t.stream, scratch_);
      return;
    }
    for (i64 r = 0; r < leaves; ++r) convert(stored_.data() + r * STRIP, values_.data() + r * STRIP, count);
    for (i64 k = 0; k < row_count; ++k)
      store_leaves(target + rows[k].target, pointers_.data(), s, a, count, t.stream, scratch_);
  }

  // Independent noise on a finished stretch of a row.
  void independent(const Row& row, bool row_copy, i64 from, i64 to) {
    B* x = static_cast<B*>(t.target) + row.target;
    const C amplitude = C(t.independent_amplitude);
    for (i64 c = from; c < to; c += STRIP) {
      const int count = int(std::min<i64>(STRIP, to - c));
      const float* raw = draws(words_.data(), t.distribution, row.target_linear + u64(t.column_offset + c), count, 0,
                               INDEPENDENT, t.noise_key);
      for (int i = 0; i < count; ++i)
        if (row_copy || (t.column_copy && t.column_copy[c + i]))
          x[c + i] = T::store(T::round(T::load(x[c + i]) + C(raw[i]) * amplitude));
    }
  }

 private:
  std::vector<const B*> repeated_;
  void repeat(i64 leaves, const B* strip) {
    if (i64(repeated_.size()) < leaves || repeated_[0] != strip) repeated_.assign(size_t(leaves), strip);
  }
};

// Bits as they are: no computing, any type of 1, 2, 4, 8 or 16 bytes.
struct Bits16 { u64 a, b; };
template <class B>
class Copier {
  const Task& t;
  std::vector<const B*> repeated_;
  alignas(64) B strip_[STRIP];
  alignas(64) B scratch_[STRIP];

 public:
  explicit Copier(const Task& task) : t(task) {}
  void strip(const Row& row, const Row* rows, i64 row_count, const Segment& s, i64 a, int count, i64) {
    const u8 code = rank(row.code) <= rank(u8(s.code)) ? row.code : u8(s.code);
    const B* from = strip_;
    if (code == OLD) {
      const B* source = static_cast<const B*>(t.source) + row.source;
      const i64 stride = t.column_source_stride;
      if (s.units)
        for (int i = 0; i < count; ++i) strip_[i] = source[s.units[a + i] * stride];
      else if (stride == 1)
        from = source + s.first + a;
      else
        for (int i = 0; i < count; ++i) strip_[i] = source[(s.first + a + i) * stride];
    } else {
      B value;
      std::memset(&value, 0, sizeof(B));
      if (code == CONSTANT) std::memcpy(&value, t.constant_bits, sizeof(B));
      std::fill_n(strip_, count, value);
    }
    repeated_.assign(size_t(s.leaves), from);
    for (i64 k = 0; k < row_count; ++k)
      store_leaves(static_cast<B*>(t.target) + rows[k].target, repeated_.data(), s, a, count, t.stream, scratch_);
  }
  void independent(const Row&, bool, i64, i64) {}
};

// Rows of the outer group (g0, g1, g2); a group that is split contributes one pseudo-entry, its leaves come later.
void enumerate(const Task& t, const i64* group, i64 split_group, std::vector<Row>& rows, std::vector<u8>& copies) {
  rows.clear();
  copies.clear();
  i64 from[3] = {0, 0, 0}, count[3] = {1, 1, 1};
  for (int d = 0; d < t.rows_outer; ++d) {
    from[d] = t.outer[d].start[group[d]];
    count[d] = d == t.split_outer && split_group >= 0 ? 1 : t.outer[d].start[group[d] + 1] - from[d];
  }
  for (i64 a = 0; a < count[0]; ++a)
    for (i64 b = 0; b < count[1]; ++b)
      for (i64 c = 0; c < count[2]; ++c) {
        const i64 pick[3] = {from[0] + a, from[1] + b, from[2] + c};
        Row row{};
        row.factor = t.scale;
        row.code = OLD;
        u8 copy = 0;
        for (int d = 0; d < t.rows_outer; ++d) {
          const Outer& o = t.outer[d];
          const i64 unit = o.unit[group[d]], entry = o.entry[pick[d]], global = entry + o.offset;
          const u8 code = o.code[group[d]];
          const bool leaves = d == t.split_outer && split_group >= 0;
          row.unit[d] = unit;
          row.source += unit * o.source_stride;
          row.virtual_linear += u64(unit) * u64(o.virtual_linear);
          row.split_linear += u64(d == t.split_outer ? unit : global) * u64(o.split_linear);
          if (!leaves) {
            row.target += entry * o.target_stride;
            row.target_linear += u64(global) * u64(o.target_linear);
          }
          if (o.scale) row.factor *= o.scale[entry];
          if (rank(code) < rank(row.code)) row.code = code;
          if (code == MEAN) row.mean_set |= 1 << d;
          if (code == RANDOM) row.literal = true;
          if (o.copy && !leaves) copy |= o.copy[entry];
        }
        rows.push_back(row);
        copies.push_back(copy);
      }
}

template <class M>
void run(const Task& t) {
  i64 groups[3] = {1, 1, 1}, total = 1;
  bool scaled = false;
  for (int d = 0; d < t.rows_outer; ++d) {
    groups[d] = t.outer[d].groups;
    total *= groups[d];
    scaled |= t.outer[d].scale != nullptr && d != t.split_outer;
  }
  // whether rows that copy the same source row get the same values
  const bool same = !scaled && !t.tree_noise && !t.pair_noise;
  std::vector<i64> strips(size_t(t.segments) + 1, 0);
  for (i64 s = 0; s < t.segments; ++s) strips[size_t(s) + 1] = strips[size_t(s)] + (t.segment[s].count + STRIP - 1) / STRIP;
  const i64 per_row = strips.back();
  if (per_row == 0 || total == 0) return;
  i64 chunks = 1;  // pieces of a row that different threads may take
  if (!t.independent && total < 8 * t.threads) chunks = std::min(per_row, (8 * t.threads + total - 1) / total);
  const i64 tasks = total * chunks;
  const i64 grain = std::max<i64>(1, std::min<i64>(tasks / (8 * t.threads), (1 << 16) / std::max<i64>(1, per_row * STRIP / chunks) + 1));
#pragma omp parallel num_threads(int(t.threads)) if (t.threads > 1)
  {
    M machine(t);
    std::vector<Row> rows;
    std::vector<u8> copies;
#pragma omp for schedule(dynamic, grain)
    for (i64 task = 0; task < tasks; ++task) {
      const i64 chunk = task % chunks;
      i64 rest = task / chunks, group[3];
      for (int d = 2; d >= 0; --d) group[d] = rest % groups[d], rest /= groups[d];
      i64 split_group = -1;
      if (t.split_outer >= 0) {
        const Outer& o = t.outer[t.split_outer];
        const i64 g = group[t.split_outer];
        if (o.shape[g] > 0 || (o.paired && o.paired[g] > 0)) split_group = g;
      }
      enumerate(t, group, split_group, rows, copies);
      const i64 first = per_row * chunk / chunks, last = per_row * (chunk + 1) / chunks, count = i64(rows.size());
      for (i64 r = 0; r < count; r += same ? count : 1) {
        i64 s = std::upper_bound(strips.begin(), strips.end(), first) - strips.begin() - 1;
        for (i64 at = first; at < last; ++at) {
          while (at >= strips[size_t(s) + 1]) ++s;
          const Segment& segment = t.segment[s];
          const i64 a = (at - strips[size_t(s)]) * STRIP;
          const int n = int(std::min<i64>(STRIP, segment.count - a));
          machine.strip(rows[size_t(r)], &rows[size_t(r)], same ? count : 1, segment, a, n, split_group);
        }
      }
      if (t.independent && split_group < 0)
        for (i64 r = 0; r < count; ++r) machine.independent(rows[size_t(r)], copies[size_t(r)] != 0, 0, t.columns);
      if (t.independent && split_group >= 0) {
        const Outer& o = t.outer[t.split_outer];
        for (i64 e = o.start[split_group]; e < o.start[split_group + 1]; ++e)
          for (i64 r = 0; r < count; ++r) {
            Row row = rows[size_t(r)];
            row.target += o.entry[e] * o.target_stride;
            row.target_linear += u64(o.entry[e] + o.offset) * u64(o.target_linear);
            machine.independent(row, copies[size_t(r)] || (o.copy && o.copy[o.entry[e]]), 0, t.columns);
          }
      }
    }
#if defined(__x86_64__)
    if (t.stream) _mm_sfence();
#endif
  }
}

}  // namespace

extern "C" {

int fxgrow_abi() { return int(sizeof(Task)) * 10000 + int(sizeof(Segment)) * 100 + int(sizeof(Outer)) % 100; }

int fxgrow_run(const Task* t) {
  try {
    switch (t->item_bytes) {
      case 1: run<Copier<u8>>(*t); return 0;
      case 2: run<Copier<u16>>(*t); return 0;
      case 4: run<Copier<u32>>(*t); return 0;
      case 8: run<Copier<u64>>(*t); return 0;
      case 16: run<Copier<Bits16>>(*t); return 0;
      default: break;
    }
    switch (t->target_type) {
      case F32: run<Machine<AsF32>>(*t); return 0;
      case BF16: run<Machine<AsBF16>>(*t); return 0;
      case F16: run<Machine<AsF16>>(*t); return 0;
      case F64: run<Machine<AsF64>>(*t); return 0;
      default: return 2;
    }
  } catch (...) {
    return 1;
  }
}

// Many small tensors, each on one thread.
int fxgrow_run_many(const Task* tasks, i64 count, i64 threads) {
  int status = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads)) reduction(| : status) if (threads > 1 && count > 1)
  for (i64 k = 0; k < count; ++k) status |= fxgrow_run(tasks + k);
  return status;
}

// Take the pages of a fresh allocation, which nothing has touched, from the system: one call for many pages costs less
// than a fault for each. Contents that are there already are kept. Returns the bytes that got huge pages.
//
// Huge pages are several times cheaper, if the system has them at hand. Where it has to compact memory first, or a
// hypervisor has taken free memory back, they are several times dearer: each is timed, and after one of more than `dear` CPU
// seconds the others are small, unless two in a row of 2 MiB of these take more than `dear_small`.
i64 fxgrow_take_pages(void* start, i64 bytes, i64 want_huge, double dear, double dear_small, i64 threads) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE) && defined(MADV_HUGEPAGE)
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), size = uintptr_t(2) << 20;
  const uintptr_t lo = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
  const uintptr_t hi = (reinterpret_cast<uintptr_t>(start) + uintptr_t(bytes)) / page * page;
  if (hi <= lo) return 0;
  auto advise = [=](int what) { return madvise(reinterpret_cast<void*>(lo), hi - lo, what) == 0; };
  auto now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
  };
  enum Mode { SMALL, HUGE, SMALL_AFTER_DEAR, HUGE_AFTER_ALL };
  std::atomic<int> mode{want_huge && advise(MADV_HUGEPAGE) ? HUGE : SMALL}, slow{0};
  std::atomic<i64> next{0}, huge_bytes{0};
  std::atomic<bool> works{true};
  const uintptr_t first = lo / size;
  const i64 regions = i64((hi - 1) / size - first) + 1;
#pragma omp parallel num_threads(int(threads)) if (threads > 1 && regions > 8)
  while (works) {
    const i64 region = next++;
    if (region >= regions) break;
    const uintptr_t from = std::max(lo, (first + uintptr_t(region)) * size);
    const uintptr_t to = std::min(hi, (first + uintptr_t(region) + 1) * size);
    int was = mode;
    const double before = now();
    if (madvise(reinterpret_cast<void*>(from), to - from, MADV_POPULATE_WRITE)) works = false;  // before Linux 5.14
    const bool whole = to - from == size, huge = was == HUGE || was == HUGE_AFTER_ALL;
    if (whole && huge) huge_bytes += i64(size);
    if (!whole || (was != HUGE && was != SMALL_AFTER_DEAR)) continue;
    if (now() - before <= (huge ? dear : dear_small)) {
      slow = 0;
    } else if (huge || ++slow == 2) {
      slow = 0;
      if (mode.compare_exchange_strong(was, huge ? SMALL_AFTER_DEAR : HUGE_AFTER_ALL))
        advise(huge ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
    }
  }
  return works ? i64(huge_bytes) : 0;
#else
  return 0;
#endif
}
}
