/* One pass, block by block, with the norm kernels of the searches.
 *
 * Duplicates are counted on a sample of values, not of rows: a row is in the sample when the low
 * bits of its content's hash are zero, so all copies of a vector are in it or none, and the share
 * of copies found there estimates the file's without bias (Gibbons, "Distinct sampling for
 * highly-accurate answers to distinct values queries", 2001). When the table is full one more bit
 * is asked for and what no longer belongs is dropped: up to SAMPLE_MAX different vectors the count
 * is of all rows. */
#include "tools/vector_stats.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "index/distance.h"
#include "storage/base/bytes.h"
#include "storage/base/digest.h"

#define BLOCK_BYTES (4u << 20)
#define SAMPLE_MAX (1u << 20)
#define SLOT_COUNT (2u * SAMPLE_MAX)

struct slot {
    uint64_t hash;
    uint64_t count; /* 0: empty */
};

struct sample {
    struct slot *slots;
    uint64_t used;
    uint64_t mask; /* of the bits that are zero in every hash of the sample */
};

/* The top bits choose the slot: the low ones are what the sample is cut by. */
static struct slot *slot_of(struct slot *slots, uint64_t hash)
{
    uint64_t i = (hash >> 40) % SLOT_COUNT;

    while (slots[i].count && slots[i].hash != hash)
        i = (i + 1) % SLOT_COUNT;
    return &slots[i];
}

static int sample_halve(struct sample *sample, struct error *err)
{
    struct slot *kept = calloc(SLOT_COUNT, sizeof *kept);

    if (!kept)
        return error_set(err, ERR_NOMEM, "no memory for a sample of %u vectors", SAMPLE_MAX);
    sample->mask = sample->mask << 1 | 1;
    sample->used = 0;
    for (uint32_t i = 0; i < SLOT_COUNT; i++)
        if (sample->slots[i].count && !(sample->slots[i].hash & sample->mask)) {
            *slot_of(kept, sample->slots[i].hash) = sample->slots[i];
            sample->used++;
        }
    free(sample->slots);
    sample->slots = kept;
    return 0;
}

static int sample_offer(struct sample *sample, const void *row, uint32_t row_bytes,
                        struct error *err)
{
    uint64_t hash = key_hash(row, row_bytes);

    if (hash & sample->mask)
        return 0;
    while (sample->used >= SAMPLE_MAX)
        if (sample_halve(sample, err) < 0)
            return -1;
    if (hash & sample->mask)
        return 0;
    struct slot *slot = slot_of(sample->slots, hash);

    sample->used += slot->count == 0;
    slot->hash = hash;
    slot->count++;
    return 0;
}

/* Values whose exponent is all ones, without relying on the compiler's idea of NaN. */
static void count_nonfinite(const uint8_t *row, uint32_t dim, uint64_t *nan, uint64_t *infinity)
{
    uint64_t both = 0, infinite = 0;

    for (uint32_t i = 0; i < dim; i++) {
        uint32_t bits = load_u32(row + 4 * (uint64_t)i) & 0x7fffffff;

        both += bits >= 0x7f800000;
        infinite += bits == 0x7f800000;
    }
    *nan = both - infinite;
    *infinity = infinite;
}

/* The kernel sums in float; where that leaves the range of a float, the sum is taken again. */
static double norm_of_floats(const struct distance_kernels *kernels, const float *row, uint32_t dim)
{
    float norm2 = kernels->norm2_f32(row, dim);
    double sum = 0;

    if (isnormal(norm2) && norm2 > 1e-30f)
        return sqrt((double)norm2);
    for (uint32_t i = 0; i < dim; i++)
        sum += (double)row[i] * row[i];
    return sqrt(sum);
}

/* Sums of the rows seen so far; the mean and the deviation by Welford's recurrence. */
struct norms {
    uint64_t count;
    double min, max, mean, squares;
};

static void norms_add(struct norms *norms, double norm)
{
    double off = norm - norms->mean;

    norms->min = norms->count == 0 || norm < norms->min ? norm : norms->min;
    norms->max = norms->count == 0 || norm > norms->max ? norm : norms->max;
    norms->count++;
    norms->mean += off / (double)norms->count;
    norms->squares += off * (norm - norms->mean);
}

static int row_scan(const struct distance_kernels *kernels, enum element_type type,
                    const uint8_t *row, uint32_t dim, uint64_t number, struct norms *norms,
                    struct vector_stats *out, struct error *err)
{
    uint64_t nan = 0, infinity = 0;
    double norm;

    switch (type) {
    case ELEMENT_F32:
        count_nonfinite(row, dim, &nan, &infinity);
        if (nan + infinity) {
            out->nan_count += nan;
            out->infinity_count += infinity;
            if (out->bad_rows++ == 0)
                out->first_bad_row = number;
            return 0;
        }
        norm = norm_of_floats(kernels, (const float *)(const void *)row, dim);
        break;
    case ELEMENT_U8:
        norm = sqrt((double)kernels->norm2_u8(row, dim));
        break;
    case ELEMENT_I8:
        norm = sqrt((double)kernels->norm2_i8((const int8_t *)row, dim));
        break;
    default:
        return error_set(err, ERR_UNSUPPORTED, "vectors of %s cannot be inspected",
                         element_name(type));
    }
    out->zero_vectors += norm == 0;
    norms_add(norms, norm);
    return 0;
}

int vector_stats_scan(const struct vector_source *source, struct job *job, struct vector_stats *out,
                      struct error *err)
{
    const struct distance_kernels *kernels = distance_kernels_best();
    uint64_t rows = vector_source_rows(source);
    uint32_t dim = vector_source_dim(source), row_bytes = vector_source_row_bytes(source);
    uint64_t block_rows = BLOCK_BYTES / row_bytes ? BLOCK_BYTES / row_bytes : 1;
    struct sample sample = {.slots = calloc(SLOT_COUNT, sizeof *sample.slots)};
    uint8_t *block = malloc(block_rows * row_bytes);
    struct norms norms = {0};
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (!sample.slots || !block) {
        error_set(err, ERR_NOMEM, "no memory for a block of %llu rows",
                  (unsigned long long)block_rows);
        goto done;
    }
    job_phase(job, "read", rows);
    for (uint64_t first = 0; first < rows; first += block_rows) {
        uint64_t count = rows - first < block_rows ? rows - first : block_rows;

        if (vector_source_read(source, first, count, block, err) < 0)
            goto done;
        for (uint64_t i = 0; i < count; i++) {
            const uint8_t *row = block + i * row_bytes;

            if (row_scan(kernels, vector_source_type(source), row, dim, first + i, &norms, out,
                         err) < 0 ||
                sample_offer(&sample, row, row_bytes, err) < 0)
                goto done;
        }
        if (job_advance(job, count, err) < 0)
            goto done;
    }
    job_finish(job);
    out->norm_min = norms.min;
    out->norm_max = norms.max;
    out->norm_mean = norms.mean;
    out->norm_deviation = norms.count ? sqrt(norms.squares / (double)norms.count) : 0;
    for (uint32_t i = 0; i < SLOT_COUNT; i++) {
        out->sample_rows += sample.slots[i].count;
        out->sample_copies += sample.slots[i].count ? sample.slots[i].count - 1 : 0;
    }
    rc = 0;
done:
    free(sample.slots);
    free(block);
    return rc;
}
