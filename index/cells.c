/* How it works: a centroid is the mean of its cell's vectors, kept as a byte a dimension on one
 * scale: value = low + step * byte. The scale is the one of the least squared error among the whole
 * range and ranges without the values farthest out; but where the centroids are means of bytes the
 * step is 1, because the query is put on the same scale and then loses nothing.
 *
 * Ranking is integers throughout, so every instruction set gives the same cells. A key is small
 * where a centroid is near; of equal keys the lower cell wins. From the products of bytes q of the
 * query and c of a centroid, both made by a kernel as sum (q - 128) * c:
 * - L2: sum (q - c)^2 = sum q^2 + (sum c^2 - 256 * sum c) - 2 * sum (q - 128) * c;
 * - inner product: the query gets its own scale with a whole zero point, q' = scale * (q - zero),
 *   and the part that `low` has in the products is the same for all centroids, so the order is that
 *   of sum (q - zero) * c = sum (q - 128) * c - (zero - 128) * sum c.
 * Both are one number a centroid holds, times a weight, less the products. They fit 32 bits for
 * every dim; sums on the way there may wrap.
 *
 * Centroids stand in blocks of 16: four dimensions of the first, of the second, ... of the last,
 * then the next four dimensions. So a register holds 16 centroids' sums and none is added up across
 * its lanes, which is most of what distance.h's kernels do when called for each centroid. What is
 * left is the time to fetch them: the nearest 100 of 12,500 cells of 128 dimensions take 10 us, 17
 * when nothing is in the second cache.
 *
 * Two levels: the cells of a block are a group, with the mean of their bytes. Half as many
 * groups are looked into as cells are wanted, and some. Groups are not stored: they are made from
 * the centroids. Few cells, or many wanted, are ranked in one level.
 *
 * Selection: the key of the last cell to take is found by counting keys in bins between the least
 * and the greatest, then again inside the bin it is in; then one pass over the keys, which stand in
 * the order of cells, takes them. No sorting, and hardly a branch that cannot be predicted. AVX-512
 * packs the lanes of a register that are wanted: the range is halved instead, keeping the keys of
 * the half, and sixteen cells are taken at once. The key is the same however it is found.
 *
 * Building takes a float a dimension of every cell, for the scale needs all of them: four times
 * what the cells themselves take.
 *
 * Stored form, little-endian: a header of 64 bytes, then the centroids, a byte a dimension, one
 * after the other. */
#include "index/cells.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "storage/base/bytes.h"
#include "storage/base/random.h"

#define ALIGNMENT 64u           /* a block's row of four dimensions, too */
#define LANES 16u               /* centroids in a block, and cells in a group */
#define QUAD 4u                 /* dimensions that stand together */
#define GROUPS_FROM_CELLS 1024u /* fewer cost no more than a few microseconds in one level */
/* Groups looked into are one for every two cells wanted, and these. Of the nearest 100 of 12,500
 * cells (a million SIFT vectors in space order) that finds 98.9 %, of the nearest 400 99.8 %. */
#define VISIT_EXTRA 37u
#define BIN_BITS 10u
#define BINS (1u << BIN_BITS)
#define SORT_KEYS_MAX 24u
#define QUANTILE_SAMPLE 65536u
#define SCALE_SEED 11u
/* Centroids of bytes below this range would waste the scale on a step of 1. */
#define BYTE_RANGE_MIN 64

static const char cells_magic[8] = "ANNDCEL1";
static const uint32_t cells_version = 1;

/* Offsets in the header. */
enum {
    HEADER_MAGIC = 0,      /* 00-07 */
    HEADER_VERSION = 8,    /* 08-11 */
    HEADER_CRC = 12,       /* 12-15 CRC-32C of header and centroids, this field as zero */
    HEADER_ROWS = 16,      /* 16-23 rows in all cells, below 2^32 */
    HEADER_COUNT = 24,     /* 24-27 cells: rows / rows a cell, rounded up */
    HEADER_CELL_ROWS = 28, /* 28-31 */
    HEADER_DIM = 32,       /* 32-35 */
    HEADER_LOW = 36,       /* 36-39 float */
    HEADER_STEP = 40,      /* 40-43 float, above 0 */
    HEADER_RESERVED = 44,  /* 44-63 zero */
    HEADER_SIZE = 64
};

/* Blocks of centroids, the last one filled with zeros. */
struct level {
    uint8_t *blocks;    /* LANES x quads x QUAD bytes each */
    uint32_t *sums;     /* of each centroid its bytes */
    uint32_t *l2_terms; /* sum of squared bytes - 256 * sum of bytes, modulo 2^32 */
};

struct cells {
    uint64_t row_count;
    uint32_t cell_rows;
    uint32_t dim;
    uint32_t count;
    uint32_t group_count; /* 0: one level */
    float low;
    float step;
    uint32_t quads; /* of dimensions, the last one filled with zeros */
    struct level cells;
    struct level groups;
};

struct cells_builder {
    uint64_t row_count;
    uint64_t added;
    uint32_t cell_rows;
    uint32_t dim;
    uint32_t count;
    double *sum;  /* dim, of the cell begun */
    float *means; /* count x dim */
};

/* ---- shape ---- */

struct shape {
    uint64_t count;
    uint64_t group_count;
    uint64_t block_bytes;
    uint64_t total;
};

static uint64_t blocks_of(uint64_t count)
{
    return (count + LANES - 1) / LANES;
}

static uint64_t level_bytes(uint64_t count, uint64_t block_bytes)
{
    return blocks_of(count) * (block_bytes + 2 * LANES * sizeof(uint32_t));
}

static struct shape shape_of(uint64_t row_count, uint32_t cell_rows, uint32_t dim)
{
    struct shape shape = {0};

    shape.count = row_count / cell_rows + (row_count % cell_rows != 0);
    if (shape.count >= GROUPS_FROM_CELLS)
        shape.group_count = blocks_of(shape.count);
    shape.block_bytes = (uint64_t)LANES * align_up(dim, QUAD);
    shape.total = align_up(sizeof(struct cells), ALIGNMENT) +
                  level_bytes(shape.count, shape.block_bytes) +
                  level_bytes(shape.group_count, shape.block_bytes);
    return shape;
}

static uint8_t *place_level(struct level *level, uint64_t count, uint64_t block_bytes, uint8_t *at)
{
    level->blocks = at;
    at += blocks_of(count) * block_bytes;
    level->sums = (uint32_t *)at;
    at += blocks_of(count) * LANES * sizeof(uint32_t);
    level->l2_terms = (uint32_t *)at;
    return at + blocks_of(count) * LANES * sizeof(uint32_t);
}

static struct cells *cells_new(uint64_t row_count, uint32_t cell_rows, uint32_t dim,
                               struct error *err)
{
    struct shape shape = shape_of(row_count, cell_rows, dim);
    uint8_t *at = aligned_alloc(ALIGNMENT, shape.total);
    struct cells *cells = (struct cells *)at;

    if (!at) {
        error_set(err, ERR_NOMEM, "no memory for %llu cells of %u dimensions",
                  (unsigned long long)shape.count, dim);
        return NULL;
    }
    memset(at, 0, shape.total);
    cells->row_count = row_count;
    cells->cell_rows = cell_rows;
    cells->dim = dim;
    cells->quads = (dim + QUAD - 1) / QUAD;
    cells->count = (uint32_t)shape.count;
    cells->group_count = (uint32_t)shape.group_count;
    at += align_up(sizeof *cells, ALIGNMENT);
    at = place_level(&cells->cells, shape.count, shape.block_bytes, at);
    place_level(&cells->groups, shape.group_count, shape.block_bytes, at);
    return cells;
}

uint32_t cells_count(const struct cells *cells)
{
    return cells->count;
}

uint32_t cells_rows(const struct cells *cells)
{
    return cells->cell_rows;
}

uint32_t cells_dim(const struct cells *cells)
{
    return cells->dim;
}

uint64_t cells_memory_bytes(const struct cells *cells)
{
    return cells_memory_plan(cells->row_count, cells->cell_rows, cells->dim);
}

uint64_t cells_memory_plan(uint64_t row_count, uint32_t cell_rows, uint32_t dim)
{
    return cell_rows ? shape_of(row_count, cell_rows, dim).total : 0;
}

void cells_free(struct cells *cells)
{
    free(cells);
}

/* ---- bytes ---- */

/* To nearest; whatever is outside, or no number, becomes an end of the scale. Selections, so that a
 * query's bytes are made several at a time. */
static inline uint8_t to_byte(double value)
{
    value = value > 0 ? value : 0;
    value = value < 255 ? value : 255;
    return (uint8_t)(int32_t)(value + 0.5);
}

static uint8_t *byte_at(const struct cells *cells, const struct level *level, uint32_t i,
                        uint32_t d)
{
    size_t block = (size_t)(i / LANES) * cells->quads + d / QUAD;

    return level->blocks + (block * LANES + i % LANES) * QUAD + d % QUAD;
}

static void put_centroid(const struct cells *cells, struct level *level, uint32_t i,
                         const uint8_t *bytes)
{
    uint32_t sum = 0, squares = 0;

    for (uint32_t d = 0; d < cells->dim; d++) {
        *byte_at(cells, level, i, d) = bytes[d];
        sum += bytes[d];
        squares += (uint32_t)bytes[d] * bytes[d];
    }
    level->sums[i] = sum;
    level->l2_terms[i] = squares - 256 * sum;
}

/* Every cell has been put. `bytes`: room for dim. */
static void make_groups(struct cells *cells, uint8_t *bytes)
{
    for (uint32_t g = 0; g < cells->group_count; g++) {
        uint32_t first = g * LANES, left = cells->count - first;
        uint32_t n = left < LANES ? left : LANES;

        for (uint32_t d = 0; d < cells->dim; d++) {
            const uint8_t *bytes_of_d = byte_at(cells, &cells->cells, first, d);
            uint32_t sum = 0;

            for (uint32_t i = 0; i < n; i++)
                sum += bytes_of_d[i * QUAD];
            bytes[d] = (uint8_t)((sum + n / 2) / n);
        }
        put_centroid(cells, &cells->groups, g, bytes);
    }
}

/* ---- the scale ---- */

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a;
    float y = *(const float *)b;

    return (x > y) - (x < y);
}

/* low and step so that low + 255 * step is high; a range of nothing gets a step all the same. */
static void scale_of(double low, double high, float *out_low, float *out_step)
{
    float step = (float)((high - low) / 255);

    *out_low = (float)low;
    *out_step = step >= FLT_MIN ? step : 1;
}

static double squared_error(const float *values, uint64_t count, float low, float step)
{
    double sum = 0, per = 1 / (double)step;

    for (uint64_t i = 0; i < count; i++) {
        double lost = values[i] - (low + (double)step * to_byte((values[i] - (double)low) * per));

        sum += lost * lost;
    }
    return sum;
}

static int choose_scale(const float *values, uint64_t count, float *low, float *step,
                        struct error *err)
{
    static const double left_out[] = {0.001, 0.01};
    uint32_t sampled = count < QUANTILE_SAMPLE ? (uint32_t)count : QUANTILE_SAMPLE;
    float least = INFINITY, greatest = -INFINITY;
    struct random random;
    float *sample;
    double error;

    *low = 0;
    *step = 1;
    if (count == 0)
        return 0;
    for (uint64_t i = 0; i < count; i++) {
        if (!isfinite(values[i]))
            return error_set(err, ERR_INVALID, "cells: a vector is not finite");
        least = values[i] < least ? values[i] : least;
        greatest = values[i] > greatest ? values[i] : greatest;
    }
    if ((double)greatest - least > BYTE_RANGE_MIN) {
        if (least >= 0 && greatest <= 255)
            return 0;
        if (least >= -128 && greatest <= 127) {
            *low = -128;
            return 0;
        }
    }
    sample = malloc(sampled * sizeof *sample);
    if (!sample)
        return error_set(err, ERR_NOMEM, "no memory for the scale of cells");
    random_init(&random, SCALE_SEED, 0);
    for (uint32_t i = 0; i < sampled; i++)
        sample[i] = values[sampled == count ? i : random_below(&random, count)];
    qsort(sample, sampled, sizeof *sample, compare_floats);
    scale_of(least, greatest, low, step);
    error = squared_error(values, count, *low, *step);
    for (size_t i = 0; i < sizeof left_out / sizeof left_out[0]; i++) {
        uint32_t cut = (uint32_t)(sampled * left_out[i] / 2);
        float other_low, other_step;
        double other;

        scale_of(sample[cut], sample[sampled - 1 - cut], &other_low, &other_step);
        other = squared_error(values, count, other_low, other_step);
        if (other < error) {
            error = other;
            *low = other_low;
            *step = other_step;
        }
    }
    free(sample);
    return 0;
}

/* ---- building ---- */

int cells_builder_new(uint64_t row_count, uint32_t cell_rows, uint32_t dim,
                      struct cells_builder **out, struct error *err)
{
    struct cells_builder *builder = NULL;
    uint64_t count;
    int rc = -1;

    if (cell_rows == 0 || dim == 0 || dim > DISTANCE_DIM_MAX || row_count > UINT32_MAX) {
        error_set(err, ERR_INVALID, "cells of %u rows, %u dimensions, %llu rows in all", cell_rows,
                  dim, (unsigned long long)row_count);
        goto done;
    }
    count = shape_of(row_count, cell_rows, dim).count;
    builder = calloc(1, sizeof *builder);
    if (builder) {
        builder->row_count = row_count;
        builder->cell_rows = cell_rows;
        builder->dim = dim;
        builder->count = (uint32_t)count;
        builder->sum = calloc(dim, sizeof *builder->sum);
        builder->means = malloc((count ? count : 1) * dim * sizeof *builder->means);
    }
    if (!builder || !builder->sum || !builder->means) {
        error_set(err, ERR_NOMEM, "no memory to build %llu cells of %u dimensions",
                  (unsigned long long)count, dim);
        goto done;
    }
    *out = builder;
    builder = NULL;
    rc = 0;
done:
    cells_builder_free(builder);
    return rc;
}

void cells_builder_add(struct cells_builder *builder, const float *vectors, uint32_t count)
{
    uint32_t dim = builder->dim;

    for (uint32_t i = 0; i < count; i++, vectors += dim) {
        uint64_t row = builder->added++;
        uint64_t in_cell = row % builder->cell_rows + 1;

        if (row >= builder->row_count)
            continue; /* cells_builder_finish refuses */
        for (uint32_t d = 0; d < dim; d++)
            builder->sum[d] += vectors[d];
        if (in_cell == builder->cell_rows || row + 1 == builder->row_count) {
            float *mean = builder->means + row / builder->cell_rows * dim;

            for (uint32_t d = 0; d < dim; d++) {
                mean[d] = (float)(builder->sum[d] / (double)in_cell);
                builder->sum[d] = 0;
            }
        }
    }
}

int cells_builder_finish(struct cells_builder *builder, struct cells **out, struct error *err)
{
    uint64_t values = (uint64_t)builder->count * builder->dim;
    struct cells *cells = NULL;
    uint8_t *bytes = NULL;
    int rc = -1;

    if (builder->added != builder->row_count) {
        error_set(err, ERR_INTERNAL, "cells: %llu rows were announced, %llu added",
                  (unsigned long long)builder->row_count, (unsigned long long)builder->added);
        goto done;
    }
    cells = cells_new(builder->row_count, builder->cell_rows, builder->dim, err);
    if (!cells || choose_scale(builder->means, values, &cells->low, &cells->step, err) < 0)
        goto done;
    bytes = malloc(builder->dim);
    if (!bytes) {
        error_set(err, ERR_NOMEM, "no memory for a centroid of %u dimensions", builder->dim);
        goto done;
    }
    for (uint32_t i = 0; i < cells->count; i++) {
        const float *mean = builder->means + (size_t)i * builder->dim;

        for (uint32_t d = 0; d < builder->dim; d++)
            bytes[d] = to_byte((mean[d] - (double)cells->low) * (1 / (double)cells->step));
        put_centroid(cells, &cells->cells, i, bytes);
    }
    make_groups(cells, bytes);
    *out = cells;
    cells = NULL;
    rc = 0;
done:
    free(bytes);
    cells_free(cells);
    return rc;
}

void cells_builder_free(struct cells_builder *builder)
{
    if (!builder)
        return;
    free(builder->sum);
    free(builder->means);
    free(builder);
}

/* ---- stored form ---- */

int cells_encode_bytes(const struct cells *cells, uint8_t **out, size_t *bytes, struct error *err)
{
    size_t values = (size_t)cells->count * cells->dim, total = HEADER_SIZE + values;
    uint8_t *data = calloc(1, total);

    if (!data)
        return error_set(err, ERR_NOMEM, "no memory for %zu bytes of cells", total);
    memcpy(data + HEADER_MAGIC, cells_magic, sizeof cells_magic);
    store_u32(data + HEADER_VERSION, cells_version);
    store_u64(data + HEADER_ROWS, cells->row_count);
    store_u32(data + HEADER_COUNT, cells->count);
    store_u32(data + HEADER_CELL_ROWS, cells->cell_rows);
    store_u32(data + HEADER_DIM, cells->dim);
    store_f32(data + HEADER_LOW, cells->low);
    store_f32(data + HEADER_STEP, cells->step);
    for (uint32_t i = 0; i < cells->count; i++) {
        for (uint32_t d = 0; d < cells->dim; d++)
            data[HEADER_SIZE + (size_t)i * cells->dim + d] = *byte_at(cells, &cells->cells, i, d);
    }
    store_u32(data + HEADER_CRC, crc32c(0, data, total));
    *out = data;
    *bytes = total;
    return 0;
}

static uint32_t checksum(const uint8_t *data, size_t bytes)
{
    static const uint8_t zero[4];
    uint32_t crc = crc32c(0, data, HEADER_CRC);

    crc = crc32c(crc, zero, sizeof zero);
    return crc32c(crc, data + HEADER_CRC + 4, bytes - HEADER_CRC - 4);
}

int cells_decode_bytes(const uint8_t *data, size_t bytes, const char *where, struct cells **out,
                       struct error *err)
{
    static const uint8_t zeros[HEADER_SIZE - HEADER_RESERVED];
    uint32_t count, cell_rows, dim, version;
    struct cells *cells;
    uint64_t row_count;
    uint8_t *mean;
    float low, step;

    if (bytes < HEADER_SIZE)
        return error_set(err, ERR_CORRUPT, "%s: %zu bytes of cells, their header takes %d", where,
                         bytes, HEADER_SIZE);
    if (memcmp(data + HEADER_MAGIC, cells_magic, sizeof cells_magic) != 0)
        return error_set(err, ERR_CORRUPT, "%s: these are no cells", where);
    version = load_u32(data + HEADER_VERSION);
    if (version > cells_version)
        return error_set(err, ERR_UNSUPPORTED, "%s: cells of version %u, this program knows %u",
                         where, version, cells_version);
    if (version != cells_version)
        return error_set(err, ERR_CORRUPT, "%s: cells of version %u", where, version);
    if (checksum(data, bytes) != load_u32(data + HEADER_CRC))
        return error_set(err, ERR_CORRUPT, "%s: cells fail their checksum", where);
    row_count = load_u64(data + HEADER_ROWS);
    count = load_u32(data + HEADER_COUNT);
    cell_rows = load_u32(data + HEADER_CELL_ROWS);
    dim = load_u32(data + HEADER_DIM);
    low = load_f32(data + HEADER_LOW);
    step = load_f32(data + HEADER_STEP);
    if (row_count > UINT32_MAX || cell_rows == 0 || dim == 0 || dim > DISTANCE_DIM_MAX ||
        count != shape_of(row_count, cell_rows, dim).count)
        return error_set(err, ERR_CORRUPT, "%s: %u cells of %u rows, %u dimensions, %llu rows",
                         where, count, cell_rows, dim, (unsigned long long)row_count);
    if (!isfinite(low) || !isnormal(step) || step < 0)
        return error_set(err, ERR_CORRUPT, "%s: a scale of cells from %g by %g", where, (double)low,
                         (double)step);
    if (bytes - HEADER_SIZE != (uint64_t)count * dim)
        return error_set(err, ERR_CORRUPT, "%s: %zu bytes of cells, %llu wanted", where, bytes,
                         (unsigned long long)(HEADER_SIZE + (uint64_t)count * dim));
    if (memcmp(data + HEADER_RESERVED, zeros, sizeof zeros) != 0)
        return error_set(err, ERR_CORRUPT, "%s: reserved bytes of cells are not zero", where);
    mean = malloc(dim);
    if (!mean)
        return error_set(err, ERR_NOMEM, "%s: no memory for a centroid", where);
    cells = cells_new(row_count, cell_rows, dim, err);
    if (!cells) {
        free(mean);
        return -1;
    }
    cells->low = low;
    cells->step = step;
    for (uint32_t i = 0; i < count; i++)
        put_centroid(cells, &cells->cells, i, data + HEADER_SIZE + (size_t)i * dim);
    make_groups(cells, mean);
    free(mean);
    *out = cells;
    return 0;
}

/* ---- keys ---- */

/* key = offset + weight * term - (products << shift), modulo 2^32. */
struct formula {
    const int8_t *query; /* quads x QUAD: byte - 128 */
    uint32_t quads;
    uint32_t offset;
    uint32_t weight;
    uint32_t shift;
};

struct key_range {
    uint32_t least;
    uint32_t greatest;
};

/* Keys of the centroids in `count` blocks: those listed, or the first when list is NULL. Returns
 * a range they are in; what fills the last block may have widened it. */
typedef struct key_range (*rank_fn)(const struct formula *formula, const uint8_t *blocks,
                                    const uint32_t *terms, const uint32_t *list, uint32_t count,
                                    uint32_t *keys);

static struct key_range finish_keys(const struct formula *formula, const uint32_t *terms,
                                    uint32_t *keys, struct key_range range)
{
    for (uint32_t i = 0; i < LANES; i++) {
        uint32_t key = formula->offset + formula->weight * terms[i] - (keys[i] << formula->shift);

        range.least = key < range.least ? key : range.least;
        range.greatest = key > range.greatest ? key : range.greatest;
        keys[i] = key;
    }
    return range;
}

static struct key_range rank_portable(const struct formula *formula, const uint8_t *blocks,
                                      const uint32_t *terms, const uint32_t *list, uint32_t count,
                                      uint32_t *keys)
{
    struct key_range range = {UINT32_MAX, 0};

    for (uint32_t b = 0; b < count; b++, keys += LANES) {
        size_t block = list ? list[b] : b;
        const uint8_t *at = blocks + block * formula->quads * LANES * QUAD;
        int32_t sums[LANES] = {0};

        for (uint32_t d = 0; d < formula->quads * QUAD; d += QUAD) {
            const int8_t *q = formula->query + d;

            for (uint32_t i = 0; i < LANES; i++, at += QUAD)
                sums[i] += q[0] * at[0] + q[1] * at[1] + q[2] * at[2] + q[3] * at[3];
        }
        memcpy(keys, sums, sizeof sums);
        range = finish_keys(formula, terms + block * LANES, keys, range);
    }
    return range;
}

#if defined(__x86_64__)
/* Words instead of bytes: the products of bytes, added in pairs, would not fit 16 bits. */
__attribute__((target("avx2"))) static struct key_range
rank_avx2(const struct formula *formula, const uint8_t *blocks, const uint32_t *terms,
          const uint32_t *list, uint32_t count, uint32_t *keys)
{
    const __m256i even = _mm256_set1_epi16(0xff);
    struct key_range range = {UINT32_MAX, 0};

    for (uint32_t b = 0; b < count; b++, keys += LANES) {
        size_t block = list ? list[b] : b;
        const uint8_t *at = blocks + block * formula->quads * LANES * QUAD;
        __m256i sum0 = _mm256_setzero_si256(), sum1 = sum0;

        for (uint32_t i = 0; i < formula->quads; i++, at += LANES * QUAD) {
            __m256i query = _mm256_set1_epi32((int)load_u32(formula->query + (size_t)i * QUAD));
            __m256i query_even = _mm256_srai_epi16(_mm256_slli_epi16(query, 8), 8);
            __m256i query_odd = _mm256_srai_epi16(query, 8);
            __m256i x = _mm256_load_si256((const __m256i *)at);
            __m256i y = _mm256_load_si256((const __m256i *)at + 1);

            sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_and_si256(x, even), query_even));
            sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_and_si256(y, even), query_even));
            sum0 = _mm256_add_epi32(sum0, _mm256_madd_epi16(_mm256_srli_epi16(x, 8), query_odd));
            sum1 = _mm256_add_epi32(sum1, _mm256_madd_epi16(_mm256_srli_epi16(y, 8), query_odd));
        }
        _mm256_storeu_si256((__m256i *)keys, sum0);
        _mm256_storeu_si256((__m256i *)keys + 1, sum1);
        range = finish_keys(formula, terms + block * LANES, keys, range);
    }
    return range;
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))) static struct key_range
rank_vnni(const struct formula *formula, const uint8_t *blocks, const uint32_t *terms,
          const uint32_t *list, uint32_t count, uint32_t *keys)
{
    size_t block_bytes = (size_t)formula->quads * LANES * QUAD;
    const __m512i offset = _mm512_set1_epi32((int)formula->offset);
    const __m512i weight = _mm512_set1_epi32((int)formula->weight);
    const __m128i shift = _mm_cvtsi32_si128((int)formula->shift);
    __m512i least = _mm512_set1_epi32(-1), greatest = _mm512_setzero_si512();

    for (uint32_t b = 0; b < count; b++, keys += LANES) {
        size_t block = list ? list[b] : b;
        size_t next = b + 1 < count ? (list ? list[b + 1] : b + 1) : block;
        const uint8_t *at = blocks + block * block_bytes, *soon = blocks + next * block_bytes;
        const int8_t *query = formula->query;
        __m512i sums[4], key; /* four, for a sum waits five cycles for the one before */
        uint32_t i = 0;

        for (uint32_t j = 0; j < 4; j++)
            sums[j] = _mm512_setzero_si512();
#define ADD(j)                                                                                     \
    do {                                                                                           \
        _mm_prefetch((const char *)soon + (j)*64, _MM_HINT_T0);                                    \
        sums[j] = _mm512_dpbusd_epi32(sums[j], _mm512_load_si512(at + (j)*64),                     \
                                      _mm512_set1_epi32((int)load_u32(query + (j)*QUAD)));         \
    } while (0)
        for (; formula->quads - i >= 4; i += 4, at += 256, soon += 256, query += 4 * QUAD) {
            ADD(0);
            ADD(1);
            ADD(2);
            ADD(3);
        }
        for (; i < formula->quads; i++, at += 64, soon += 64, query += QUAD)
            ADD(0);
#undef ADD
        key = _mm512_add_epi32(_mm512_add_epi32(sums[0], sums[1]),
                               _mm512_add_epi32(sums[2], sums[3]));
        key = _mm512_sub_epi32(
            _mm512_add_epi32(offset,
                             _mm512_mullo_epi32(weight, _mm512_load_si512(terms + block * LANES))),
            _mm512_sll_epi32(key, shift));
        least = _mm512_min_epu32(least, key);
        greatest = _mm512_max_epu32(greatest, key);
        _mm512_storeu_si512(keys, key);
    }
    return (struct key_range){_mm512_reduce_min_epu32(least), _mm512_reduce_max_epu32(greatest)};
}
#endif

/* ---- ranking ---- */

struct ranking {
    int8_t *query;   /* quads x QUAD */
    uint32_t *bins;  /* BINS */
    uint32_t *keys;  /* small is near */
    uint32_t *spare; /* as many */
    uint32_t *list;  /* groups looked into */
    struct formula formula;
};

/* Groups to look into, 0 for one level: that is exact, and then costs no more. */
static uint32_t visited_groups(const struct cells *cells, uint32_t want)
{
    uint64_t visit = (uint64_t)want / 2 + VISIT_EXTRA;

    if (cells->group_count == 0 || visit * LANES + cells->group_count >= cells->count)
        return 0;
    return (uint32_t)visit;
}

/* Bytes for the most keys that are ranked at once. */
static uint64_t keys_bytes(const struct cells *cells, uint32_t want)
{
    uint64_t visit = visited_groups(cells, want);
    uint64_t blocks = visit ? visit : blocks_of(cells->count);

    if (blocks < blocks_of(cells->group_count))
        blocks = blocks_of(cells->group_count);
    return blocks * LANES * sizeof(uint32_t);
}

static uint64_t query_bytes(const struct cells *cells)
{
    return align_up((uint64_t)cells->quads * QUAD, ALIGNMENT);
}

size_t cells_scratch_bytes(const struct cells *cells, uint32_t want)
{
    return query_bytes(cells) + BINS * sizeof(uint32_t) + 2 * keys_bytes(cells, want) +
           align_up(visited_groups(cells, want) * sizeof(uint32_t), ALIGNMENT);
}

static void place_scratch(struct ranking *ranking, const struct cells *cells, uint32_t want,
                          void *scratch)
{
    uint8_t *at = scratch;

    ranking->query = (int8_t *)at;
    at += query_bytes(cells);
    ranking->bins = (uint32_t *)at;
    at += BINS * sizeof(uint32_t);
    ranking->keys = (uint32_t *)at;
    at += keys_bytes(cells, want);
    ranking->spare = (uint32_t *)at;
    at += keys_bytes(cells, want);
    ranking->list = (uint32_t *)at;
}

/* The query's bytes on its own scale, which has a byte for zero. Returns that. */
static uint32_t quantise_for_products(const float *query, uint32_t dim, int8_t *out)
{
    float least = 0, greatest = 0;
    double range, per;
    uint32_t zero;

    for (uint32_t d = 0; d < dim; d++) {
        least = query[d] < least ? query[d] : least;
        greatest = query[d] > greatest ? query[d] : greatest;
    }
    range = (double)greatest - least;
    per = range > 0 ? 255 / range : 0;
    zero = to_byte(-least * per);
    for (uint32_t d = 0; d < dim; d++)
        out[d] = (int8_t)(to_byte(query[d] * per + zero) - 128);
    return zero;
}

/* The query's bytes on the cells' scale. Returns the sum of their squares. */
static uint32_t quantise_for_l2(const struct cells *cells, const float *query, int8_t *out)
{
    double low = cells->low, per = 1 / (double)cells->step;
    uint32_t squares = 0;

    for (uint32_t d = 0; d < cells->dim; d++) {
        uint32_t byte = to_byte((query[d] - low) * per);

        squares += byte * byte;
        out[d] = (int8_t)((int)byte - 128);
    }
    return squares;
}

static void prepare_query(struct ranking *ranking, const struct cells *cells, enum metric metric,
                          const float *query)
{
    struct formula *formula = &ranking->formula;

    formula->query = ranking->query;
    formula->quads = cells->quads;
    /* Against the zeros that fill a centroid's last four; but memory must have a value. */
    for (uint32_t d = cells->dim; d < cells->quads * QUAD; d++)
        ranking->query[d] = 0;
    if (metric == METRIC_IP) { /* products are within 2^31 on both sides of 0 */
        formula->weight = quantise_for_products(query, cells->dim, ranking->query) - 128;
        formula->offset = UINT32_C(1) << 31;
        formula->shift = 0;
    } else {
        formula->offset = quantise_for_l2(cells, query, ranking->query);
        formula->weight = 1;
        formula->shift = 1;
    }
}

static void sort_keys(uint32_t *keys, uint32_t count)
{
    for (uint32_t i = 1; i < count; i++) {
        uint32_t key = keys[i], j = i;

        for (; j > 0 && keys[j - 1] > key; j--)
            keys[j] = keys[j - 1];
        keys[j] = key;
    }
}

/* The want-th smallest of count keys (want 1..count), all of them in `range`; *ties: how many keys
 * equal to it belong to the want smallest. Overwrites ranking->spare. */
typedef uint32_t (*limit_fn)(const struct ranking *ranking, uint32_t count, struct key_range range,
                             uint32_t want, uint32_t *ties);

static uint32_t find_limit_portable(const struct ranking *ranking, uint32_t count,
                                    struct key_range range, uint32_t want, uint32_t *ties)
{
    const uint32_t *keys = ranking->keys;

    while (range.least < range.greatest && count > SORT_KEYS_MAX) {
        uint32_t width = 32 - (uint32_t)__builtin_clz(range.greatest - range.least);
        uint32_t shift = width > BIN_BITS ? width - BIN_BITS : 0;
        uint32_t bin = 0, kept = 0;
        struct key_range next = {UINT32_MAX, 0};

        memset(ranking->bins, 0, BINS * sizeof *ranking->bins);
        for (uint32_t i = 0; i < count; i++)
            ranking->bins[(keys[i] - range.least) >> shift]++;
        for (; want > ranking->bins[bin]; bin++)
            want -= ranking->bins[bin];
        for (uint32_t i = 0; i < count; i++) { /* in place from the second time on */
            uint32_t key = keys[i];

            if ((key - range.least) >> shift != bin)
                continue;
            ranking->spare[kept++] = key;
            next.least = key < next.least ? key : next.least;
            next.greatest = key > next.greatest ? key : next.greatest;
        }
        keys = ranking->spare;
        count = kept;
        range = next;
    }
    *ties = want;
    if (range.least >= range.greatest)
        return range.least;
    if (keys != ranking->spare)
        memcpy(ranking->spare, keys, count * sizeof *keys);
    sort_keys(ranking->spare, count);
    for (uint32_t i = 0; ranking->spare[i] < ranking->spare[want - 1]; i++)
        --*ties;
    return ranking->spare[want - 1];
}

/* Puts the numbers of the want smallest of count keys (want 1..count) into out, ascending, and
 * their keys into ranking->spare. Keys stand in the order of the blocks that were ranked: those
 * listed, or the first when list is NULL. */
typedef void (*select_fn)(const struct ranking *ranking, const uint32_t *list, uint32_t count,
                          struct key_range range, uint32_t want, uint32_t *out);

static void select_portable(const struct ranking *ranking, const uint32_t *list, uint32_t count,
                            struct key_range range, uint32_t want, uint32_t *out)
{
    uint32_t ties, limit = find_limit_portable(ranking, count, range, want, &ties);

    for (uint32_t i = 0, taken = 0; taken < want; i++) {
        uint32_t key = ranking->keys[i];
        uint32_t tie = (key == limit) & (ties > 0);

        out[taken] = (list ? list[i / LANES] : i / LANES) * LANES + i % LANES;
        ranking->spare[taken] = key;
        ties -= tie;
        taken += (key < limit) | tie;
    }
}

#if defined(__x86_64__)
#define TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,bmi,popcnt")))

/* Of the `left` > 0 keys from here on, those that a register holds. */
TARGET_AVX512 static inline __mmask16 lanes_of(uint32_t left)
{
    return (__mmask16)(left < LANES ? (1u << left) - 1 : 0xffff);
}

/* The same limit by halving the range: keys up to the middle are counted, and the half that the
 * limit is in is kept. Of as many as a register holds, the one with the right number below it. */
TARGET_AVX512 static uint32_t find_limit_avx512(const struct ranking *ranking, uint32_t count,
                                                struct key_range range, uint32_t want,
                                                uint32_t *ties)
{
    const uint32_t *keys = ranking->keys;
    __m512i few;

    while (range.least < range.greatest && count > LANES) {
        uint32_t middle = range.least + (range.greatest - range.least) / 2;
        const __m512i pivot = _mm512_set1_epi32((int)middle);
        uint32_t low = 0, kept = 0;
        __mmask16 other = 0;

        for (uint32_t i = 0; i < count; i += LANES)
            low += (uint32_t)__builtin_popcount(_mm512_mask_cmple_epu32_mask(
                lanes_of(count - i), _mm512_loadu_si512(keys + i), pivot));
        if (want <= low) {
            range.greatest = middle;
        } else {
            range.least = middle + 1;
            want -= low;
            other = 0xffff;
        }
        for (uint32_t i = 0; i < count; i += LANES) { /* in place from the second time on */
            __m512i some = _mm512_loadu_si512(keys + i);
            __mmask16 keep = (__mmask16)(_mm512_cmple_epu32_mask(some, pivot) ^ other);
            uint32_t n;

            keep &= lanes_of(count - i);
            n = (uint32_t)__builtin_popcount(keep);
            _mm512_mask_storeu_epi32(ranking->spare + kept, (__mmask16)((1u << n) - 1),
                                     _mm512_maskz_compress_epi32(keep, some));
            kept += n;
        }
        keys = ranking->spare;
        count = kept;
    }
    *ties = want;
    if (range.least >= range.greatest)
        return range.least;
    few = _mm512_loadu_si512(keys);
    for (uint32_t i = 0;; i++) {
        const __m512i key = _mm512_set1_epi32((int)keys[i]);
        uint32_t below =
            (uint32_t)__builtin_popcount(_mm512_mask_cmplt_epu32_mask(lanes_of(count), few, key));
        uint32_t up_to =
            (uint32_t)__builtin_popcount(_mm512_mask_cmple_epu32_mask(lanes_of(count), few, key));

        if (below < want && want <= up_to) {
            *ties = want - below;
            return keys[i];
        }
    }
}

TARGET_AVX512 static void select_avx512(const struct ranking *ranking, const uint32_t *list,
                                        uint32_t count, struct key_range range, uint32_t want,
                                        uint32_t *out)
{
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint32_t ties, found = find_limit_avx512(ranking, count, range, want, &ties);
    const __m512i limit = _mm512_set1_epi32((int)found);

    for (uint32_t i = 0, taken = 0; taken < want; i += LANES) {
        uint32_t first = (list ? list[i / LANES] : i / LANES) * LANES, n;
        __m512i some = _mm512_loadu_si512(ranking->keys + i);
        __mmask16 real = lanes_of(count - i);
        __mmask16 take = _mm512_mask_cmplt_epu32_mask(real, some, limit);
        uint32_t equal = _mm512_mask_cmpeq_epu32_mask(real, some, limit);

        for (; equal && ties; equal &= equal - 1, ties--)
            take |= (__mmask16)(equal & -equal);
        n = (uint32_t)__builtin_popcount(take);
        _mm512_mask_storeu_epi32(out + taken, (__mmask16)((1u << n) - 1),
                                 _mm512_maskz_compress_epi32(
                                     take, _mm512_add_epi32(_mm512_set1_epi32((int)first), lane)));
        _mm512_mask_storeu_epi32(ranking->spare + taken, (__mmask16)((1u << n) - 1),
                                 _mm512_maskz_compress_epi32(take, some));
        taken += n;
    }
}
#endif

/* ---- by instruction set ---- */

struct methods {
    rank_fn rank;
    limit_fn find_limit;
    select_fn select;
};

/* The caller's table says what the machine has. */
static struct methods methods_for(const struct distance_kernels *kernels)
{
#if defined(__x86_64__)
    if (strcmp(kernels->name, "avx512vnni") == 0)
        return (struct methods){rank_vnni, find_limit_avx512, select_avx512};
    if (strncmp(kernels->name, "avx512", 6) == 0)
        return (struct methods){rank_avx2, find_limit_avx512, select_avx512};
    if (strncmp(kernels->name, "avx", 3) == 0)
        return (struct methods){rank_avx2, find_limit_portable, select_portable};
#endif
    (void)kernels;
    return (struct methods){rank_portable, find_limit_portable, select_portable};
}

/* Ranks the first `count` centroids of the blocks (see rank_fn) and puts the numbers of the `want`
 * nearest into out, ascending. want 1..count. */
static void take_nearest(const struct ranking *ranking, const struct methods *methods,
                         const struct level *level, const uint32_t *list, uint32_t count,
                         uint32_t want, uint32_t *out)
{
    const struct formula *formula = &ranking->formula;
    const uint32_t *terms = formula->shift ? level->l2_terms : level->sums;
    struct key_range range = methods->rank(formula, level->blocks, terms, list,
                                           (uint32_t)blocks_of(count), ranking->keys);

    methods->select(ranking, list, count, range, want, out);
}

/* Ranks, for 0 < want < cells->count; keys of the cells in out stand in ranking->spare. */
static void rank_nearest(const struct cells *cells, const struct methods *methods,
                         enum metric metric, const float *query, uint32_t want, void *scratch,
                         struct ranking *ranking, uint32_t *out)
{
    uint32_t visit, last, count;

    place_scratch(ranking, cells, want, scratch);
    prepare_query(ranking, cells, metric, query);
    visit = visited_groups(cells, want);
    if (visit == 0) {
        take_nearest(ranking, methods, &cells->cells, NULL, cells->count, want, out);
        return;
    }
    take_nearest(ranking, methods, &cells->groups, NULL, cells->group_count, visit, ranking->list);
    count = visit * LANES;
    last = ranking->list[visit - 1];
    if (last == cells->group_count - 1) /* which may not be whole */
        count -= cells->group_count * LANES - cells->count;
    take_nearest(ranking, methods, &cells->cells, ranking->list, count, want, out);
}

/* Sorts the `count` cells of out, whose keys stand in ranking->spare, into stages. */
static void part_stages(const struct ranking *ranking, const struct methods *methods,
                        const uint32_t *ends, uint32_t stage_count, uint32_t count, uint32_t *out)
{
    struct key_range range = {UINT32_MAX, 0};
    uint32_t limits[CELL_STAGES_MAX], ties[CELL_STAGES_MAX], filled[CELL_STAGES_MAX];
    uint32_t *keys = ranking->keys, *cells = ranking->spare;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t key = keys[i] = ranking->spare[i];

        range.least = key < range.least ? key : range.least;
        range.greatest = key > range.greatest ? key : range.greatest;
    }
    for (uint32_t s = 0; s + 1 < stage_count; s++)
        limits[s] = methods->find_limit(ranking, count, range, ends[s], &ties[s]);
    for (uint32_t s = 0; s < stage_count; s++)
        filled[s] = s ? ends[s - 1] : 0;
    memcpy(cells, out, count * sizeof *cells);
    for (uint32_t i = 0; i < count; i++) {
        uint32_t stage = stage_count - 1;

        for (uint32_t s = stage_count - 1; s-- > 0;) {
            if (keys[i] < limits[s] || (keys[i] == limits[s] && ties[s] && ties[s]--))
                stage = s;
        }
        out[filled[stage]++] = cells[i];
    }
}

uint32_t cells_nearest(const struct cells *cells, const struct distance_kernels *kernels,
                       enum metric metric, const float *query, uint32_t want, void *scratch,
                       uint32_t *out)
{
    return cells_nearest_in_stages(cells, kernels, metric, query, &want, 1, scratch, out);
}

uint32_t cells_nearest_in_stages(const struct cells *cells, const struct distance_kernels *kernels,
                                 enum metric metric, const float *query, const uint32_t *ends,
                                 uint32_t stage_count, void *scratch, uint32_t *out)
{
    struct methods methods = methods_for(kernels);
    uint32_t want = ends[stage_count - 1], all = want < cells->count ? want : cells->count;
    struct ranking ranking;

    if (want == 0)
        return 0;
    if (want >= cells->count) {
        for (uint32_t i = 0; i < all; i++)
            out[i] = i;
        return all;
    }
    rank_nearest(cells, &methods, metric, query, want, scratch, &ranking, out);
    if (stage_count > 1)
        part_stages(&ranking, &methods, ends, stage_count, want, out);
    return want;
}
