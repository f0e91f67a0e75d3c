// Copies pieces of memory and checksums them, in one pass over the bytes. kv_transfer/pieces.py is its other half.
//
// The checksum is XXH3 with 64 bits and no seed, as it is specified for inputs of more than 240 bytes, so that a worker built
// without this file agrees with one that has it. A region is read in stripes of 64 bytes: eight numbers for eight lanes.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

static_assert(std::endian::native == std::endian::little);

namespace {

constexpr uint64_t kPrime32[] = {0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D};
constexpr uint64_t kPrime64[] = {0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5};
constexpr uint64_t kSecretWords[] = {
    0xbe4ba423396cfeb8, 0x1cad21f72c81017c, 0xdb979083e96dd4de, 0x1f67b3b7a4a44072, 0x78e5c0cc4ee679cb, 0x2172ffcc7dd05a82,
    0x8e2443f7744608b8, 0x4c263a81e69035e0, 0xcb00c391bb52283c, 0xa32e531b8b65d088, 0x4ef90da297486471, 0xd8acdea946ef1938,
    0x3f349ce33f76faa8, 0x1d4f0bc7c7bbdcf9, 0x3159b4cd4be0518a, 0x647378d9c97e9fc8, 0xc3ebd33483acc5ea, 0xeb6313faffa081c5,
    0x49daf0b751dd0d17, 0x9e68d429265516d3, 0xfca1477d58be162b, 0xce31d07ad1b8f88f, 0x280416958f3acb45, 0x7e404bbbcafbd7af};
const uint8_t* const kSecret = reinterpret_cast<const uint8_t*>(kSecretWords);

constexpr int64_t kStripe = 64;
// Stripes after which the lanes are scrambled: each has met another part of the secret.
constexpr int64_t kBlockStripes = 16;
const uint8_t* const kScrambleSecret = kSecret + 128;
const uint8_t* const kLastStripeSecret = kSecret + 121;
const uint8_t* const kMergeSecret = kSecret + 11;
// How far ahead lines are asked for; the processor's own guesses stop at the end of each page.
constexpr int64_t kAhead = 512;
// Copies of at least this much go past the caches: none of what they push out of a core's own cache would stay there anyway, and
// lines that are written whole need not be read before.
constexpr int64_t kStreamedBytes = 1 << 20;

// What becomes of the bytes that are read.
enum class Copy { kNone, kPlain, kStreamed };

uint64_t read64(const uint8_t* bytes) {
  uint64_t number;
  std::memcpy(&number, bytes, sizeof number);
  return number;
}

// Each stripe meets its own part of the secret, 8 bytes further on.
using AddStripes = void(uint64_t* lanes, const uint8_t* source, uint8_t* target, int64_t count, const uint8_t* secret);

template <Copy copy>
void add_stripes(uint64_t* lanes, const uint8_t* source, uint8_t* target, int64_t count, const uint8_t* secret) {
  for (int64_t stripe = 0; stripe < count; ++stripe, source += kStripe, secret += 8) {
    for (int i = 0; i < 8; ++i) {
      const uint64_t data = read64(source + 8 * i), key = data ^ read64(secret + 8 * i);
      lanes[i] += (key & 0xFFFFFFFF) * (key >> 32);
      lanes[i ^ 1] += data;
    }
    if constexpr (copy != Copy::kNone) target = static_cast<uint8_t*>(std::memcpy(target, source, kStripe)) + kStripe;
  }
}

#if defined(__x86_64__)

template <Copy copy>
__attribute__((target("avx2"))) void add_stripes_avx2(uint64_t* lanes, const uint8_t* source, uint8_t* target, int64_t count,
                                                      const uint8_t* secret) {
  auto* const stored = reinterpret_cast<__m256i*>(lanes);
  __m256i sums[2] = {_mm256_load_si256(stored), _mm256_load_si256(stored + 1)};
  for (int64_t stripe = 0; stripe < count; ++stripe, source += kStripe, target += kStripe, secret += 8) {
    _mm_prefetch(reinterpret_cast<const char*>(source + kAhead), _MM_HINT_T0);
    for (int i = 0; i < 2; ++i) {
      const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source) + i);
      const __m256i key = _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(secret) + i));
      const __m256i product = _mm256_mul_epu32(key, _mm256_srli_epi64(key, 32));
      const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
      sums[i] = _mm256_add_epi64(sums[i], _mm256_add_epi64(product, swapped));
      if constexpr (copy == Copy::kPlain) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target) + i, data);
      if constexpr (copy == Copy::kStreamed) _mm256_stream_si256(reinterpret_cast<__m256i*>(target) + i, data);
    }
  }
  for (int i = 0; i < 2; ++i) _mm256_store_si256(stored + i, sums[i]);
}

#endif

template <Copy copy>
AddStripes* choose_add_stripes() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2");
  if (has_avx2) return add_stripes_avx2<copy>;
#endif
  return add_stripes<copy>;
}

// Streaming stores take aligned targets alone.
bool are_aligned(uint8_t* const* targets, int64_t num_pieces) {
  return std::all_of(targets, targets + num_pieces, [](const uint8_t* target) {
    return reinterpret_cast<uintptr_t>(target) % kStripe == 0;
  });
}

AddStripes* choose_add_stripes(uint8_t* const* targets, int64_t num_pieces, int64_t piece_bytes) {
  if (targets == nullptr) return choose_add_stripes<Copy::kNone>();
  const bool streams = num_pieces * piece_bytes >= kStreamedBytes && are_aligned(targets, num_pieces);
  return streams ? choose_add_stripes<Copy::kStreamed>() : choose_add_stripes<Copy::kPlain>();
}

// Streamed stores may still be on their way; whoever is told of the copy must find it.
void finish_stores() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The checksum of one region, taken in from start to end.
class Checksum {
 public:
  explicit Checksum(int64_t num_bytes) : num_bytes_(num_bytes), left_(num_bytes / kStripe) {}

  // Takes at most `count` stripes, no more than the region has left; returns how many.
  int64_t take(AddStripes* add_stripes, const uint8_t* source, uint8_t* target, int64_t count) {
    if (left_ == 1) {
      add_stripes(lanes_, source, target, 1, kLastStripeSecret);
      left_ = 0;
      return 1;
    }
    const int64_t taken = std::min({count, left_ - 1, kBlockStripes - in_block_});
    add_stripes(lanes_, source, target, taken, kSecret + 8 * in_block_);
    left_ -= taken;
    in_block_ += taken;
    if (in_block_ == kBlockStripes) scramble();
    return taken;
  }

  bool is_complete() const { return left_ == 0; }

  uint64_t value() const {
    uint64_t hash = static_cast<uint64_t>(num_bytes_) * kPrime64[0];
    for (int i = 0; i < 8; i += 2) {
      const uint64_t left = lanes_[i] ^ read64(kMergeSecret + 8 * i), right = lanes_[i + 1] ^ read64(kMergeSecret + 8 * i + 8);
      const unsigned __int128 product = static_cast<unsigned __int128>(left) * right;
      hash += static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }
    hash = (hash ^ (hash >> 37)) * 0x165667919E3779F9;
    return hash ^ (hash >> 32);
  }

 private:
  void scramble() {
    for (int i = 0; i < 8; ++i) {
      lanes_[i] = (lanes_[i] ^ (lanes_[i] >> 47) ^ read64(kScrambleSecret + 8 * i)) * kPrime32[0];
    }
    in_block_ = 0;
  }

  alignas(32) uint64_t lanes_[8] = {kPrime32[2], kPrime64[0], kPrime64[1], kPrime64[2],
                                    kPrime64[3], kPrime32[1], kPrime64[4], kPrime32[0]};
  int64_t num_bytes_;
  // In stripes.
  int64_t left_;
  int64_t in_block_ = 0;
};

}  // namespace

// The pieces, one after the other, are regions: `checksums` gets one number for each. `piece_bytes` and `region_bytes` are
// multiples of 64, a region has more than 240. Without `targets` (null) the sources are only read.
extern "C" void segue_take_pieces(const uint8_t* const* sources, uint8_t* const* targets, int64_t num_pieces,
                                  int64_t piece_bytes, int64_t region_bytes, uint64_t* checksums) {
  AddStripes* const add_stripes = choose_add_stripes(targets, num_pieces, piece_bytes);
  Checksum checksum(region_bytes);
  for (int64_t piece = 0; piece < num_pieces; ++piece) {
    for (int64_t done = 0; done < piece_bytes;) {
      uint8_t* const target = targets == nullptr ? nullptr : targets[piece] + done;
      done += kStripe * checksum.take(add_stripes, sources[piece] + done, target, (piece_bytes - done) / kStripe);
      if (checksum.is_complete()) {
        *checksums++ = checksum.value();
        checksum = Checksum(region_bytes);
      }
    }
  }
  finish_stores();
}
