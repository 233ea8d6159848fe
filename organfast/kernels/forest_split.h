/* The innermost loops of forest.h, in versions for three kinds of processor with the same result but
   for the order within a set.

   forest_split parts a list of positions at a node.

        from    a b c d e f g h        positions that stand at the node
        voxels  3 9 1 4 7 0 8 2        what each reads; threshold 4
        to      a c d f h | g e b      at most 4 from the front, above from the back

   First the voxels are copied side by side, one plain load each; then 8 or 16 positions at a time
   are compared and packed to both ends. Copying costs 0.33 ns a voxel, and the hardware gathers cost
   0.42 to 0.6 (512 bits) and 1.1 (256 bits) on the Ice Lake this was measured on, the more where
   microcode mends gather data sampling. A gather of int16 also reads 2 bytes too many; plain loads
   stay within the slab. Packing is what vectors are for: without it a position costs twice as much.

   forest_mark parts a set that is kept as marks, one bit a position, in blocks of up to 64 that lie
   side by side in memory: 32 voxels are compared at once, and none is copied. It takes all blocks,
   marked or not, and so pays for large sets. forest_list makes a list of what is marked.

   Functions carry their own target, so that wheels need no wide vectors; forest_path_at(path) is
   asked for only after forest_has_path(path). */
#ifndef ORGANFAST_FOREST_SPLIT_H
#define ORGANFAST_FOREST_SPLIT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FOREST_SLOT_BITS = 13, FOREST_CHUNK = 1 << FOREST_SLOT_BITS };

/* A position on its way: its voxel's distance in bytes from the chunk's first one, and its number
   (slot) in the chunk, in the lower bits. */
typedef uint32_t forest_item;

/* The vector versions read, and never use, up to so many items past a set. */
enum { FOREST_PAD = 16 };

/* The voxel at any address; a slab may be a field of packed records. */
static inline int16_t forest_voxel(const char *at)
{
    int16_t hu;
    memcpy(&hu, at, sizeof hu);
    return hu;
}

/* Part n items; `base` is where an item at distance 0 reads. How many went to the front is
   returned. `voxels` is scratch for n + FOREST_PAD. */
typedef ptrdiff_t forest_split(const forest_item *from, forest_item *to, ptrdiff_t n,
                               const char *base, int16_t threshold, int16_t *voxels);

/* Part n_blocks blocks: block b reads from base + places[b], as many voxels as the lowest bits of
   live[b] say. Of `marks` those that go right move to `right`; how many, is returned. */
typedef ptrdiff_t forest_mark(const char *base, const ptrdiff_t *places, const uint64_t *live,
                              ptrdiff_t n_blocks, int16_t threshold, uint64_t *marks,
                              uint64_t *right);

/* Write the items that are marked, of 64 per block; up to FOREST_PAD more are written over. */
typedef void forest_list(const forest_item *items, const uint64_t *marks, ptrdiff_t n_blocks,
                         forest_item *to);

/* Without `mark` there are lists only. */
typedef struct {
    forest_split *split;
    forest_mark *mark;
    forest_list *list;
} forest_path;

/* Each item is written at both ends; the end that does not count is written over. */
static ptrdiff_t forest_split_scalar(const forest_item *restrict from, forest_item *restrict to,
                                     ptrdiff_t n, const char *base, int16_t threshold,
                                     int16_t *voxels)
{
    ptrdiff_t front = 0;
    (void)voxels;
    for (ptrdiff_t i = 0, rest = n - 1; rest >= 0; i++, rest--) {
        forest_item item = from[i];
        to[front] = item;
        to[front + rest] = item; /* every item that went right brought the back one nearer */
        front += forest_voxel(base + (item >> FOREST_SLOT_BITS)) <= threshold;
    }
    return front;
}

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#define FOREST_V3 __attribute__((target("avx2,bmi,bmi2,popcnt")))
#define FOREST_V4 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt")))

static inline void forest_copy_voxels(const forest_item *restrict from, ptrdiff_t n,
                                      const char *base, int16_t *restrict voxels)
{
    ptrdiff_t i = 0;
    for (; i + 4 <= n; i += 4) {
        voxels[i] = forest_voxel(base + (from[i] >> FOREST_SLOT_BITS));
        voxels[i + 1] = forest_voxel(base + (from[i + 1] >> FOREST_SLOT_BITS));
        voxels[i + 2] = forest_voxel(base + (from[i + 2] >> FOREST_SLOT_BITS));
        voxels[i + 3] = forest_voxel(base + (from[i + 3] >> FOREST_SLOT_BITS));
    }
    for (; i < n; i++) voxels[i] = forest_voxel(base + (from[i] >> FOREST_SLOT_BITS));
}

/* For each set of lanes that go right, the lanes in their new order: first those that go left. */
static uint64_t forest_lane_order[256];

static void forest_fill_lane_order(void)
{
    for (unsigned right = 0; right < 256; right++) {
        uint64_t order = 0;
        int n = 0;
        for (unsigned side = 0; side < 2; side++)
            for (uint64_t lane = 0; lane < 8; lane++)
                if ((right >> lane & 1) == side) order |= lane << 8 * n++;
        forest_lane_order[right] = order;
    }
}

FOREST_V3 static inline unsigned forest_right_lanes(const int16_t *voxels, __m128i threshold)
{
    __m128i above = _mm_cmpgt_epi16(_mm_loadu_si128((const __m128i *)voxels), threshold);
    return (unsigned)_mm_movemask_epi8(_mm_packs_epi16(above, _mm_setzero_si128()));
}

FOREST_V3 static inline __m256i forest_reorder(const forest_item *from, unsigned right)
{
    __m128i order = _mm_loadl_epi64((const __m128i *)&forest_lane_order[right]);
    return _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)from),
                                       _mm256_cvtepu8_epi32(order));
}

FOREST_V3 static ptrdiff_t forest_split_v3(const forest_item *restrict from,
                                           forest_item *restrict to, ptrdiff_t n,
                                           const char *base, int16_t threshold, int16_t *voxels)
{
    const __m128i limit = _mm_set1_epi16(threshold);
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    ptrdiff_t front = 0, back = n, i = 0;
    forest_copy_voxels(from, n, base, voxels);
    /* While 16 places are free, what is written beside the 8 that count is written over. */
    for (; i + 16 <= n; i += 8) {
        unsigned right = forest_right_lanes(voxels + i, limit);
        int n_right = __builtin_popcount(right);
        __m256i parted = forest_reorder(from + i, right);
        _mm256_storeu_si256((__m256i *)(to + front), parted);
        _mm256_storeu_si256((__m256i *)(to + back - 8), parted);
        front += 8 - n_right;
        back -= n_right;
    }
    for (; i < n; i += 8) {
        int here = n - i < 8 ? (int)(n - i) : 8;
        unsigned all = (1u << here) - 1;
        unsigned right = forest_right_lanes(voxels + i, limit);
        int n_right = __builtin_popcount(right & all), n_left = here - n_right;
        __m256i parted = forest_reorder(from + i, right | (~all & 255)); /* the others come last */
        __m256i goes_left = _mm256_cmpgt_epi32(_mm256_set1_epi32(n_left), lanes);
        __m256i is_here = _mm256_cmpgt_epi32(_mm256_set1_epi32(here), lanes);
        __m256i goes_right = _mm256_andnot_si256(goes_left, is_here);
        _mm256_maskstore_epi32((int *)(to + front), goes_left, parted);
        _mm256_maskstore_epi32((int *)(to + back - here), goes_right, parted);
        front += n_left;
        back -= n_right;
    }
    return front;
}

FOREST_V4 static ptrdiff_t forest_split_v4(const forest_item *restrict from,
                                           forest_item *restrict to, ptrdiff_t n,
                                           const char *base, int16_t threshold, int16_t *voxels)
{
    const __m256i limit = _mm256_set1_epi16(threshold);
    ptrdiff_t front = 0, back = n;
    forest_copy_voxels(from, n, base, voxels);
    for (ptrdiff_t i = 0; i < n; i += 16) {
        __mmask16 all = (__mmask16)(n - i >= 16 ? 0xffff : (1u << (n - i)) - 1);
        __m512i items = _mm512_loadu_si512(from + i);
        __m256i hu = _mm256_loadu_si256((const __m256i *)(voxels + i));
        __mmask16 right = _mm256_mask_cmpgt_epi16_mask(all, hu, limit);
        __mmask16 left = (__mmask16)(all & ~right);
        int n_left = __builtin_popcount(left), n_right = __builtin_popcount(right);
        back -= n_right;
        _mm512_mask_storeu_epi32(to + front, (__mmask16)((1u << n_left) - 1),
                                 _mm512_maskz_compress_epi32(left, items));
        _mm512_mask_storeu_epi32(to + back, (__mmask16)((1u << n_right) - 1),
                                 _mm512_maskz_compress_epi32(right, items));
        front += n_left;
    }
    return front;
}

FOREST_V3 static inline uint64_t forest_above_v3(const char *at, __m256i limit)
{
    const __m256i *voxels = (const __m256i *)at;
    uint64_t above = 0;
    for (int half = 0; half < 2; half++) {
        __m256i a = _mm256_cmpgt_epi16(_mm256_loadu_si256(voxels + 2 * half), limit);
        __m256i b = _mm256_cmpgt_epi16(_mm256_loadu_si256(voxels + 2 * half + 1), limit);
        __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8); /* a, then b */
        above |= (uint64_t)(uint32_t)_mm256_movemask_epi8(bytes) << 32 * half;
    }
    return above;
}

FOREST_V3 static ptrdiff_t forest_mark_v3(const char *base, const ptrdiff_t *places,
                                          const uint64_t *live, ptrdiff_t n_blocks,
                                          int16_t threshold, uint64_t *marks, uint64_t *right)
{
    const __m256i limit = _mm256_set1_epi16(threshold);
    int16_t part[64] = {0};
    ptrdiff_t n_right = 0;
    for (ptrdiff_t b = 0; b < n_blocks; b++) {
        const char *at = base + places[b];
        if (~live[b]) { /* nothing beyond a block is read */
            memcpy(part, at, sizeof *part * (size_t)__builtin_popcountll(live[b]));
            at = (const char *)part;
        }
        uint64_t above = forest_above_v3(at, limit);
        right[b] = marks[b] & above;
        marks[b] &= ~above;
        n_right += __builtin_popcountll(right[b]);
    }
    return n_right;
}

FOREST_V3 static void forest_list_v3(const forest_item *items, const uint64_t *marks,
                                     ptrdiff_t n_blocks, forest_item *to)
{
    for (ptrdiff_t b = 0; b < n_blocks; b++, items += 64) {
        if (!marks[b]) continue;
        for (int i = 0; i < 64; i += 8) {
            unsigned marked = marks[b] >> i & 255;
            _mm256_storeu_si256((__m256i *)to, forest_reorder(items + i, ~marked & 255));
            to += __builtin_popcount(marked);
        }
    }
}

FOREST_V4 static ptrdiff_t forest_mark_v4(const char *base, const ptrdiff_t *places,
                                          const uint64_t *live, ptrdiff_t n_blocks,
                                          int16_t threshold, uint64_t *marks, uint64_t *right)
{
    const __m512i limit = _mm512_set1_epi16(threshold);
    ptrdiff_t n_right = 0;
    for (ptrdiff_t b = 0; b < n_blocks; b++) {
        const char *at = base + places[b]; /* lanes that are masked out are not read */
        __m512i low = _mm512_maskz_loadu_epi16((__mmask32)live[b], at);
        __m512i high = _mm512_maskz_loadu_epi16((__mmask32)(live[b] >> 32), at + 64);
        uint64_t above = _mm512_cmpgt_epi16_mask(low, limit);
        above |= (uint64_t)_mm512_cmpgt_epi16_mask(high, limit) << 32;
        right[b] = marks[b] & above;
        marks[b] &= ~above;
        n_right += __builtin_popcountll(right[b]);
    }
    return n_right;
}

FOREST_V4 static void forest_list_v4(const forest_item *items, const uint64_t *marks,
                                     ptrdiff_t n_blocks, forest_item *to)
{
    for (ptrdiff_t b = 0; b < n_blocks; b++, items += 64) {
        if (!marks[b]) continue;
        for (int i = 0; i < 64; i += 16) {
            __mmask16 marked = (__mmask16)(marks[b] >> i);
            _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(marked,
                                                                _mm512_loadu_si512(items + i)));
            to += __builtin_popcount(marked);
        }
    }
}

static int forest_has_path(int path)
{
    __builtin_cpu_init();
    int v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi")
             && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
    int v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
             && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return path == 0 || (path == 1 && v3) || (path == 2 && v4);
}

static forest_path forest_path_at(int path)
{
    forest_path v4 = {forest_split_v4, forest_mark_v4, forest_list_v4};
    forest_path v3 = {forest_split_v3, forest_mark_v3, forest_list_v3};
    forest_path scalar = {forest_split_scalar, NULL, NULL};
    return path == 2 ? v4 : path == 1 ? v3 : scalar;
}

#else

static void forest_fill_lane_order(void) {}

static int forest_has_path(int path) { return path == 0; }

static forest_path forest_path_at(int path)
{
    forest_path scalar = {forest_split_scalar, NULL, NULL};
    (void)path;
    return scalar;
}

#endif
#endif
