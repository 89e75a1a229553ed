/* Checks, the loop over the pool, the byte of own distortion, the choice among codes and the stored
 * bytes; the codes themselves are tables of methods (code_methods.h).
 *
 * Codes are trained on the first half of the sample and judged on the second, so that what is
 * measured is how they treat vectors training has not seen. The scale of own distortions comes from
 * the second half too: from the least error but a thousandth to the greatest but a thousandth, in
 * 255 steps of one ratio. A stray vector may be clamped; it must not coarsen everybody's scale, nor
 * the steps of the query's integer table, whose range the scale's is part of.
 *
 * The bake-off trains each kind once for each number of bytes: with own distortion a code has one
 * byte less for the vector, and is no cut-down version of the longer one. Of a large sample all get
 * the same part and the same few Lloyd steps, which order them as well as the whole does. Held-out
 * rows are then ranked by the very tables and kernels a search uses, the count of rows to verify
 * decides, and the winner is trained again on all there is: the segment is searched for months. So
 * is its rival where the part leaves open whether a rotation pays.
 *
 * Stored form, little-endian: a header of 64 bytes, then the code's numbers. */
#include "index/quantiser.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "index/code_methods.h"
#include "index/distance.h"
#include "index/gemm.h"
#include "index/opq.h"
#include "index/pq.h"
#include "index/scalar_code.h"
#include "storage/base/bytes.h"

#define ENCODE_GRAIN (2u * CODE_BLOCK)
#define SCRATCH_FLOATS_MIN 16u /* so that a caller's malloc of the scratch is never of nothing */
#define SHARE_MAX 1e30f        /* what is left of an infinite share; 32,768 add up in a float */
#define SCALE_SPAN 1e4f        /* own distortions tell apart: a step is then at most 4 % */

/* The bake-off. */
#define QUERIES_MAX 500u
#define BASE_ROWS_MAX 20000u
#define TRUE_NEIGHBOURS 10u
/* What a code is trained on to be compared: 32 rows a centroid. */
#define TRIAL_ROWS 8192u
#define TRIAL_ITERATIONS 6u
/* The true neighbours: queries and rows a GEMM call takes. */
#define TRUTH_QUERIES 32u
#define TRUTH_ROWS 512u
/* How many times the rows of the best code a simpler one may need. The first is about the noise of
 * the sample. A rotation has to earn its matrix and its time, and its advantage on a sample shrinks
 * with more rows: what is 5 % on 20,000 rows of SIFT is nothing on the million. */
#define TIE 1.02
#define TIE_ROTATION 1.10
/* Trained on a part, codes come out this near to being tied the other way round. */
#define RUN_OFF 1.25

static const char quantiser_magic[8] = "ANNDQNT1";
static const uint32_t quantiser_version = 2;

/* Offsets in the header. */
enum {
    HEADER_MAGIC = 0,       /* 00-07 */
    HEADER_VERSION = 8,     /* 08-11 */
    HEADER_CRC = 12,        /* 12-15 CRC-32C of header and numbers, this field as zero */
    HEADER_BYTES_ALL = 16,  /* 16-23 header and numbers */
    HEADER_KIND = 24,       /* 24-27 enum code_kind, never CODE_AUTO */
    HEADER_DIM = 28,        /* 28-31 */
    HEADER_CODE_BYTES = 32, /* 32-35 with the byte of own distortion */
    HEADER_DISTORTION = 36, /* 36-39 float, mean */
    HEADER_OWN = 40,        /* 40-43 1: the last byte is the vector's own distortion; 0 */
    HEADER_OWN_LEAST = 44,  /* 44-47 float, what byte 0 stands for; 0 without own distortion */
    HEADER_OWN_RATIO = 48,  /* 48-51 float, between neighbouring bytes; 0 likewise */
    HEADER_RESERVED = 52,   /* 52-63 zero */
    HEADER_SIZE = 64
};

struct quantiser {
    const struct code_methods *methods;
    void *code;
    uint32_t dim;
    uint32_t code_bytes;
    float distortion;
    bool own;
    float own_least, own_ratio;
    float own_values[CODE_VALUES]; /* ascending: what the last byte stands for */
};

/* Also the order of simplicity. */
static const struct code_methods *const all_methods[] = {&pq_methods, &opq_methods,
                                                         &scalar_code_methods};
#define METHODS_COUNT (sizeof all_methods / sizeof all_methods[0])

static const struct code_methods *methods_of(uint32_t kind)
{
    for (size_t i = 0; i < METHODS_COUNT; i++) {
        if ((uint32_t)all_methods[i]->kind == kind)
            return all_methods[i];
    }
    return NULL;
}

const char *code_kind_name(enum code_kind kind)
{
    const struct code_methods *methods = methods_of(kind);

    if (kind == CODE_AUTO)
        return "auto";
    return methods ? methods->name : "unknown";
}

int code_kind_parse(const char *text, enum code_kind *out, struct error *err)
{
    if (strcasecmp(text, "auto") == 0) {
        *out = CODE_AUTO;
        return 0;
    }
    for (size_t i = 0; i < METHODS_COUNT; i++) {
        if (strcasecmp(text, all_methods[i]->name) == 0) {
            *out = all_methods[i]->kind;
            return 0;
        }
    }
    return error_set(err, ERR_INVALID, "'%.64s' is no code: wants auto, pq, opq or scalar", text);
}

void quantiser_free(struct quantiser *quantiser)
{
    if (!quantiser)
        return;
    quantiser->methods->free(quantiser->code);
    free(quantiser);
}

enum code_kind quantiser_kind(const struct quantiser *quantiser)
{
    return quantiser->methods->kind;
}

bool quantiser_has_own_distortion(const struct quantiser *quantiser)
{
    return quantiser->own;
}

uint32_t quantiser_dim(const struct quantiser *quantiser)
{
    return quantiser->dim;
}

uint32_t quantiser_code_bytes(const struct quantiser *quantiser)
{
    return quantiser->code_bytes;
}

float quantiser_distortion(const struct quantiser *quantiser)
{
    return quantiser->distortion;
}

float quantiser_code_distortion(const struct quantiser *quantiser, const uint8_t *code)
{
    return quantiser->own ? quantiser->own_values[code[quantiser->code_bytes - 1]]
                          : quantiser->distortion;
}

uint64_t quantiser_memory_bytes(const struct quantiser *quantiser)
{
    return sizeof *quantiser + quantiser->methods->memory_bytes(quantiser->code);
}

/* Bytes of the code proper. */
static uint32_t chunk_count(const struct quantiser *quantiser)
{
    return quantiser->code_bytes - quantiser->own;
}

size_t quantiser_table_entries(const struct quantiser *quantiser)
{
    return (size_t)quantiser->code_bytes * CODE_VALUES;
}

/* The shares, then what the code needs to make them. */
size_t quantiser_scratch_floats(const struct quantiser *quantiser)
{
    return quantiser_table_entries(quantiser) + SCRATCH_FLOATS_MIN +
           quantiser->methods->scratch_floats(quantiser->code);
}

/* A query, or numbers from a file, may be finite and their squares not. */
static void clamp_shares(float *shares, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (!(shares[i] < SHARE_MAX))
            shares[i] = SHARE_MAX; /* NaN as well */
        else if (shares[i] < -SHARE_MAX)
            shares[i] = -SHARE_MAX;
    }
}

void quantiser_table(const struct quantiser *quantiser, enum metric metric, const float *query,
                     float *scratch, struct code_table *table)
{
    uint32_t chunks = chunk_count(quantiser);
    float *shares = scratch;
    float *rest = scratch + quantiser_table_entries(quantiser);

    quantiser->methods->table(quantiser->code, metric, query, rest, shares);
    if (metric == METRIC_L2 && quantiser->own)
        memcpy(shares + (size_t)chunks++ * CODE_VALUES, quantiser->own_values,
               sizeof quantiser->own_values);
    code_table_fill(table, shares, chunks);
    if (!isfinite(table->offset) || !isfinite(table->step)) {
        clamp_shares(shares, (size_t)chunks * CODE_VALUES);
        code_table_fill(table, shares, chunks);
    }
    if (metric == METRIC_L2 && !quantiser->own)
        table->offset += quantiser->distortion;
}

void quantiser_decode(const struct quantiser *quantiser, const uint8_t *code, float *vector)
{
    quantiser->methods->decode(quantiser->code, code, vector);
}

/* ---- own distortion ---- */

/* False when a value is out of a float's range. */
static bool own_scale_set(struct quantiser *quantiser, float least, float ratio)
{
    double value = (double)least;

    quantiser->own_least = least;
    quantiser->own_ratio = ratio;
    for (uint32_t b = 0; b < CODE_VALUES; b++) {
        quantiser->own_values[b] = (float)value;
        if (!isfinite(quantiser->own_values[b]))
            return false;
        value *= (double)ratio;
    }
    return true;
}

static int compare_floats(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

/* Sorts the errors, which are finite. */
static bool own_scale_fit(struct quantiser *quantiser, float *errors, uint32_t count)
{
    uint32_t stray = count / 1000;
    float least, greatest;

    qsort(errors, count, sizeof *errors, compare_floats);
    least = errors[stray];
    greatest = errors[count - 1 - stray];
    if (least < greatest / SCALE_SPAN)
        least = greatest / SCALE_SPAN;
    return own_scale_set(
        quantiser, least,
        least > 0 ? (float)pow((double)greatest / (double)least, 1.0 / (CODE_VALUES - 1)) : 1.0f);
}

/* The byte whose value is nearest. */
static uint8_t own_byte(const struct quantiser *quantiser, float error)
{
    const float *values = quantiser->own_values;
    uint32_t low = 0, high = CODE_VALUES - 1;

    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (error - values[middle] > values[middle + 1] - error)
            low = middle + 1;
        else
            high = middle;
    }
    return (uint8_t)low;
}

/* ---- encoding ---- */

struct encode_work {
    const struct quantiser *quantiser;
    const float *vectors;
    uint8_t *codes;
    float *errors; /* may be NULL */
    size_t scratch_floats;
    float *scratch; /* workers x scratch_floats */
};

static void encode_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct encode_work *work = context;
    const struct quantiser *quantiser = work->quantiser;
    uint32_t code_bytes = quantiser->code_bytes;
    float *scratch = work->scratch + worker * work->scratch_floats;
    float block_errors[CODE_BLOCK];

    for (uint64_t i = begin; i < end; i += CODE_BLOCK) {
        uint32_t count = end - i < CODE_BLOCK ? (uint32_t)(end - i) : CODE_BLOCK;
        uint8_t *codes = work->codes + i * code_bytes;
        float *errors = work->errors ? work->errors + i : quantiser->own ? block_errors : NULL;

        quantiser->methods->encode_block(quantiser->code, work->vectors + i * quantiser->dim, count,
                                         scratch, codes, code_bytes, errors);
        for (uint32_t j = 0; quantiser->own && j < count; j++)
            codes[(size_t)(j + 1) * code_bytes - 1] = own_byte(quantiser, errors[j]);
    }
}

static int encode_with_errors(const struct quantiser *quantiser, const float *vectors,
                              uint64_t count, struct pool *pool, uint8_t *codes, float *errors,
                              struct error *err)
{
    struct encode_work work = {
        .quantiser = quantiser,
        .vectors = vectors,
        .codes = codes,
        .errors = errors,
        .scratch_floats =
            SCRATCH_FLOATS_MIN + quantiser->methods->encode_scratch_floats(quantiser->code),
    };

    work.scratch = malloc(pool_workers(pool) * work.scratch_floats * sizeof *work.scratch);
    if (!work.scratch)
        return error_set(err, ERR_NOMEM, "no memory to encode with %u workers", pool_workers(pool));
    pool_for(pool, count, ENCODE_GRAIN, encode_range, &work);
    free(work.scratch);
    return 0;
}

int quantiser_encode(const struct quantiser *quantiser, const float *vectors, uint64_t count,
                     struct pool *pool, uint8_t *codes, struct error *err)
{
    return encode_with_errors(quantiser, vectors, count, pool, codes, NULL, err);
}

/* The sample as training and judging share it. */
struct sample {
    const float *rows; /* count x dim */
    uint32_t count;
    uint32_t dim;
    uint32_t held_out; /* the last rows */
    uint64_t seed;
};

static const float *held_out_rows(const struct sample *sample)
{
    return sample->rows + (size_t)(sample->count - sample->held_out) * sample->dim;
}

/* ---- the comparison ---- */

/* Held-out rows: the first are queries, the next the base they are answered from. */
struct comparison {
    const float *queries; /* query_count x dim */
    const float *base;    /* base_count x dim */
    uint32_t query_count;
    uint32_t base_count;
    uint32_t dim;
    uint32_t *truth; /* query_count x TRUE_NEIGHBOURS: rows of the base */
};

/* Nearest is the least |x|^2 / 2 - q.x, with both relative to the base's mean: far from the origin
 * the two terms would cancel to noise. */
struct truth_work {
    struct comparison *comparison;
    float *rows;       /* (query_count + base_count) x dim, centred */
    float *half_norms; /* query_count + base_count */
    double *mean;      /* dim */
    float *products;   /* workers x TRUTH_QUERIES x TRUTH_ROWS */
};

static void truth_centre_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct truth_work *work = context;
    uint32_t dim = work->comparison->dim;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        const float *row = work->comparison->queries + i * dim;
        float *centred = work->rows + i * dim;
        double norm = 0;

        for (uint32_t d = 0; d < dim; d++)
            centred[d] = (float)(row[d] - work->mean[d]);
        for (uint32_t d = 0; d < dim; d++)
            norm += (double)centred[d] * centred[d];
        work->half_norms[i] = (float)(0.5 * norm);
    }
}

/* The rows so far nearest to one query. */
struct nearest {
    float scores[TRUE_NEIGHBOURS]; /* ascending */
    uint32_t count;
};

static void nearest_offer(struct nearest *nearest, uint32_t *rows, float score, uint32_t row)
{
    uint32_t place = nearest->count;

    if (place == TRUE_NEIGHBOURS && !(score < nearest->scores[place - 1]))
        return;
    if (place < TRUE_NEIGHBOURS)
        nearest->count++;
    else
        place--;
    for (; place > 0 && score < nearest->scores[place - 1]; place--) {
        nearest->scores[place] = nearest->scores[place - 1];
        rows[place] = rows[place - 1];
    }
    nearest->scores[place] = score;
    rows[place] = row;
}

static void truth_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct truth_work *work = context;
    const struct comparison *comparison = work->comparison;
    uint32_t dim = comparison->dim;
    uint32_t queries = (uint32_t)(end - begin);
    const float *base = work->rows + (size_t)comparison->query_count * dim;
    const float *half_norms = work->half_norms + comparison->query_count;
    float *products = work->products + (size_t)worker * TRUTH_QUERIES * TRUTH_ROWS;
    struct nearest nearest[TRUTH_QUERIES];

    memset(nearest, 0, sizeof nearest);
    for (uint32_t first = 0; first < comparison->base_count; first += TRUTH_ROWS) {
        uint32_t left = comparison->base_count - first;
        uint32_t count = left < TRUTH_ROWS ? left : TRUTH_ROWS;

        gemm_f32(false, true, queries, count, dim, 1.0f, work->rows + begin * dim, dim,
                 base + (size_t)first * dim, dim, 0.0f, products, TRUTH_ROWS);
        for (uint32_t q = 0; q < queries; q++) {
            for (uint32_t i = 0; i < count; i++)
                nearest_offer(&nearest[q], comparison->truth + (begin + q) * TRUE_NEIGHBOURS,
                              half_norms[first + i] - products[(size_t)q * TRUTH_ROWS + i],
                              first + i);
        }
    }
}

static int find_truth(struct comparison *comparison, struct pool *pool, struct error *err)
{
    uint32_t dim = comparison->dim;
    uint32_t count = comparison->query_count + comparison->base_count;
    struct truth_work work = {.comparison = comparison};
    int rc = -1;

    work.rows = malloc((size_t)count * dim * sizeof *work.rows);
    work.half_norms = malloc(count * sizeof *work.half_norms);
    work.mean = calloc(dim, sizeof *work.mean);
    work.products =
        malloc((size_t)pool_workers(pool) * TRUTH_QUERIES * TRUTH_ROWS * sizeof *work.products);
    if (!work.rows || !work.half_norms || !work.mean || !work.products) {
        error_set(err, ERR_NOMEM, "no memory for the true neighbours of %u vectors",
                  comparison->query_count);
        goto done;
    }
    for (size_t i = 0; i < comparison->base_count; i++) {
        for (uint32_t d = 0; d < dim; d++)
            work.mean[d] += comparison->base[i * dim + d];
    }
    for (uint32_t d = 0; d < dim; d++)
        work.mean[d] /= comparison->base_count;
    pool_for(pool, count, TRUTH_ROWS, truth_centre_range, &work);
    pool_for(pool, comparison->query_count, TRUTH_QUERIES, truth_range, &work);
    rc = 0;
done:
    free(work.rows);
    free(work.half_norms);
    free(work.mean);
    free(work.products);
    return rc;
}

static int comparison_init(struct comparison *comparison, const struct sample *sample,
                           struct pool *pool, struct error *err)
{
    uint32_t held_out = sample->held_out;

    /* At least 128 rows are held out, so queries and base are never fewer than a dozen. */
    comparison->dim = sample->dim;
    comparison->query_count = held_out / 10 < QUERIES_MAX ? held_out / 10 : QUERIES_MAX;
    comparison->base_count = held_out - comparison->query_count;
    if (comparison->base_count > BASE_ROWS_MAX)
        comparison->base_count = BASE_ROWS_MAX;
    comparison->queries = held_out_rows(sample);
    comparison->base = comparison->queries + (size_t)comparison->query_count * comparison->dim;
    comparison->truth =
        malloc((size_t)comparison->query_count * TRUE_NEIGHBOURS * sizeof *comparison->truth);
    if (!comparison->truth)
        return error_set(err, ERR_NOMEM, "no memory to compare codes");
    return find_truth(comparison, pool, err);
}

struct rank_work {
    const struct comparison *comparison;
    const struct quantiser *quantiser;
    const uint8_t *codes;
    size_t scratch_floats;
    float *scratch;    /* workers x scratch_floats */
    uint16_t *entries; /* workers x quantiser_table_entries */
    uint16_t *sums;    /* workers x base_count */
    uint32_t *ranks;   /* query_count x TRUE_NEIGHBOURS: rows to look at until it is found */
};

static void rank_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct rank_work *work = context;
    const struct comparison *comparison = work->comparison;
    const struct quantiser *quantiser = work->quantiser;
    uint32_t count = comparison->base_count;
    const struct code_span all = {0, count};
    uint16_t *sums = work->sums + (size_t)worker * count;
    struct code_table table = {.entries =
                                   work->entries + worker * quantiser_table_entries(quantiser)};

    for (uint64_t q = begin; q < end; q++) {
        quantiser_table(quantiser, METRIC_L2, comparison->queries + q * comparison->dim,
                        work->scratch + worker * work->scratch_floats, &table);
        code_scan_kernels_best()->spans(table.entries, table.chunk_count, work->codes,
                                        quantiser->code_bytes, &all, 1, sums);
        for (uint64_t t = q * TRUE_NEIGHBOURS; t < (q + 1) * TRUE_NEIGHBOURS; t++) {
            uint32_t row = comparison->truth[t], rank = 1;

            for (uint32_t i = 0; i < row; i++)
                rank += sums[i] <= sums[row];
            for (uint32_t i = row; i < count; i++)
                rank += sums[i] < sums[row];
            work->ranks[t] = rank;
        }
    }
}

static int compare_ranks(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

/* How many rows to look at for `share` of the ranks (ascending) to be within; between two whole
 * numbers by the straight line, or codes that need eleven and twelve would all look alike. */
static float rows_for(const uint32_t *ranks, uint32_t count, double share)
{
    double wanted = share * count;
    uint32_t at = (uint32_t)ceil(wanted) - 1; /* the rank that brings the share up to it */
    uint32_t before = at, within = at + 1;

    while (before > 0 && ranks[before - 1] == ranks[at])
        before--;
    while (within < count && ranks[within] == ranks[at])
        within++;
    return (float)(ranks[at] - 1 + (wanted - before) / (within - before));
}

/* codes: of the base. */
static int compare_one(const struct comparison *comparison, const struct quantiser *quantiser,
                       const uint8_t *codes, struct pool *pool, struct code_trial *trial,
                       struct error *err)
{
    uint32_t workers = pool_workers(pool);
    uint32_t ranks = comparison->query_count * TRUE_NEIGHBOURS;
    struct rank_work work = {
        .comparison = comparison,
        .quantiser = quantiser,
        .codes = codes,
        .scratch_floats = quantiser_scratch_floats(quantiser),
    };
    int rc = -1;

    work.scratch = malloc(workers * work.scratch_floats * sizeof *work.scratch);
    work.entries =
        aligned_alloc(64, workers * quantiser_table_entries(quantiser) * sizeof *work.entries);
    work.sums = malloc((size_t)workers * comparison->base_count * sizeof *work.sums);
    work.ranks = malloc(ranks * sizeof *work.ranks);
    if (!work.scratch || !work.entries || !work.sums || !work.ranks) {
        error_set(err, ERR_NOMEM, "no memory to compare codes with %u workers", workers);
        goto done;
    }
    pool_for(pool, comparison->query_count, 2, rank_range, &work);
    qsort(work.ranks, ranks, sizeof *work.ranks, compare_ranks);
    trial->verified_95 = rows_for(work.ranks, ranks, 0.95);
    trial->verified_99 = rows_for(work.ranks, ranks, 0.99);
    rc = 0;
done:
    free(work.scratch);
    free(work.entries);
    free(work.sums);
    free(work.ranks);
    return rc;
}

/* ---- training ---- */

/* Sets the mean squared error over the first `count` held-out rows and the scale of their own; then
 * compares, unless comparison is NULL. */
static int judge(struct quantiser *quantiser, const struct sample *sample, uint32_t count,
                 const struct comparison *comparison, struct pool *pool, struct code_trial *trial,
                 struct error *err)
{
    uint32_t code_bytes = quantiser->code_bytes;
    uint8_t *codes = malloc((size_t)count * code_bytes);
    float *errors = malloc(count * sizeof *errors);
    float *sorted = malloc(count * sizeof *sorted);
    double sum = 0;
    int rc = -1;

    if (!codes || !errors || !sorted) {
        error_set(err, ERR_NOMEM, "no memory to measure a code on %u vectors", count);
        goto done;
    }
    if (encode_with_errors(quantiser, held_out_rows(sample), count, pool, codes, errors, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++)
        sum += errors[i];
    quantiser->distortion = trial->distortion = (float)(sum / count);
    memcpy(sorted, errors, count * sizeof *sorted);
    if (!isfinite(quantiser->distortion) ||
        (quantiser->own && !own_scale_fit(quantiser, sorted, count))) {
        error_set(err, ERR_INVALID,
                  "the sample's values are too large for squared distances in float, or not "
                  "finite");
        goto done;
    }
    /* They were encoded before there was a scale. */
    for (uint32_t i = 0; quantiser->own && i < count; i++)
        codes[(size_t)(i + 1) * code_bytes - 1] = own_byte(quantiser, errors[i]);
    if (comparison &&
        compare_one(comparison, quantiser, codes + (size_t)comparison->query_count * code_bytes,
                    pool, trial, err) < 0)
        goto done;
    rc = 0;
done:
    free(codes);
    free(errors);
    free(sorted);
    return rc;
}

/* How one round trains its codes and what it judges them on. */
struct round {
    uint32_t rows;       /* the sample's first */
    uint32_t iterations; /* Lloyd steps */
    uint32_t judged;     /* held-out rows */
};

static struct code_training training_of(const struct code_trial *trial, const struct sample *sample,
                                        const struct round *round)
{
    struct code_training training = {
        .sample = sample->rows,
        .count = round->rows,
        .dim = sample->dim,
        .chunk_count = trial->code_bytes - trial->own_distortion,
        .iterations = round->iterations,
        .seed = sample->seed,
    };

    return training;
}

static uint64_t training_units(const struct code_trial *trial, const struct sample *sample,
                               const struct round *round)
{
    struct code_training training = training_of(trial, sample, round);

    return methods_of(trial->kind)->train_units(&training);
}

/* comparison: may be NULL. */
static int train_one(struct code_trial *trial, const struct sample *sample,
                     const struct round *round, const struct comparison *comparison,
                     struct pool *pool, struct job *job, struct quantiser **out, struct error *err)
{
    struct code_training training = training_of(trial, sample, round);
    struct quantiser *quantiser = calloc(1, sizeof *quantiser);

    if (!quantiser)
        return error_set(err, ERR_NOMEM, "no memory for a quantiser");
    quantiser->methods = methods_of(trial->kind);
    quantiser->dim = sample->dim;
    quantiser->code_bytes = trial->code_bytes;
    quantiser->own = trial->own_distortion;
    if (quantiser->methods->train(&training, pool, job, &quantiser->code, err) < 0 ||
        judge(quantiser, sample, round->judged, comparison, pool, trial, err) < 0 ||
        job_advance(job, 0, err) < 0) {
        quantiser_free(quantiser);
        return -1;
    }
    *out = quantiser;
    return 0;
}

/* ---- the bake-off ---- */

static double verified(const struct code_trial *trial)
{
    return (double)trial->verified_95 + (double)trial->verified_99;
}

/* Which codes are meant. */
enum which { PLAIN, ROTATED, ANY_KIND };

/* The first that needs the fewest rows; count when there is none of the kind. */
static uint32_t least_verified(const struct code_trial *trials, uint32_t count, enum which which)
{
    uint32_t best = count;

    for (uint32_t i = 0; i < count; i++) {
        if (which != ANY_KIND && (trials[i].kind == CODE_OPQ) != (which == ROTATED))
            continue;
        if (best == count || verified(&trials[i]) < verified(&trials[best]))
            best = i;
    }
    return best;
}

/* The simplest, which is the first, that needs hardly more rows than the best. */
static uint32_t best_trial(const struct code_trial *trials, uint32_t count)
{
    const struct code_trial *best = &trials[least_verified(trials, count, ANY_KIND)];
    uint32_t chosen = 0;

    for (; &trials[chosen] != best; chosen++) {
        bool rotation = best->kind == CODE_OPQ && trials[chosen].kind != CODE_OPQ;

        if (verified(&trials[chosen]) <= (rotation ? TIE_ROTATION : TIE) * verified(best))
            break;
    }
    return chosen;
}

/* The same choice between two. */
static uint32_t better_of(const struct code_trial *trials, uint32_t a, uint32_t b)
{
    uint32_t first = a < b ? a : b, second = a < b ? b : a;
    const struct code_trial two[] = {trials[first], trials[second]};

    return best_trial(two, 2) == 0 ? first : second;
}

/* The best code on the other side of the rotation from `chosen`, when a full training of both might
 * turn the choice; else chosen. */
static uint32_t rival_of(const struct code_trial *trials, uint32_t count, uint32_t chosen)
{
    bool rotated = trials[chosen].kind == CODE_OPQ;
    uint32_t rival = least_verified(trials, count, rotated ? PLAIN : ROTATED);
    double ratio; /* of the plain one's rows to the rotated one's */

    if (rival == count)
        return chosen;
    ratio = verified(&trials[chosen]) / verified(&trials[rival]);
    if (rotated)
        ratio = 1 / ratio;
    return ratio > 1 && ratio < RUN_OFF ? rival : chosen;
}

/* Why a code cannot have this shape, as the end of a sentence, or NULL. */
static const char *shape_refused(const struct code_methods *methods, bool own, uint32_t dim,
                                 uint32_t code_bytes)
{
    if (own && code_bytes < 2)
        return "has no byte beside the distortion's";
    if (code_bytes > DISTANCE_DIM_MAX) /* what code_table_fill takes */
        return "has more bytes than tables can add up";
    return methods->refuses(dim, code_bytes - own);
}

/* Fills bake_off with the codes that take part, in the order of simplicity. */
static int list_trials(const struct quantiser_params *params, uint32_t count, uint32_t dim,
                       struct code_bake_off *bake_off, struct error *err)
{
    uint32_t code_bytes = params->code_bytes;
    const char *refusal = NULL;

    if (params->kind != CODE_AUTO && !methods_of(params->kind))
        return error_set(err, ERR_INVALID, "%d is no kind of code", (int)params->kind);
    if (params->own_distortion > CHOICE_YES)
        return error_set(err, ERR_INVALID, "%d is no choice of own distortion",
                         (int)params->own_distortion);
    if (dim == 0 || dim > DISTANCE_DIM_MAX)
        return error_set(err, ERR_INVALID, "codes want 1 to %u dimensions, found %u",
                         DISTANCE_DIM_MAX, dim);
    if (code_bytes == 0 || code_bytes > dim + 1)
        return error_set(err, ERR_INVALID,
                         "codes of %u-dimensional vectors want 1 to %u bytes, found %u", dim,
                         dim + 1, code_bytes);
    if (count < CODE_VALUES)
        return error_set(err, ERR_INVALID, "training a code wants at least %u vectors, found %u",
                         CODE_VALUES, count);
    memset(bake_off, 0, sizeof *bake_off);
    for (size_t m = 0; m < METHODS_COUNT; m++) {
        const struct code_methods *methods = all_methods[m];

        if (params->kind != CODE_AUTO && methods->kind != params->kind)
            continue;
        if (params->kind == CODE_AUTO && methods->kind == CODE_OPQ && dim > OPQ_DIM_AUTO_MAX)
            continue;
        for (int own = 0; own < 2; own++) {
            const char *why = shape_refused(methods, own, dim, code_bytes);

            if (params->own_distortion == (own ? CHOICE_NO : CHOICE_YES))
                continue;
            if (why)
                refusal = why;
            else
                bake_off->trials[bake_off->count++] = (struct code_trial){
                    .kind = methods->kind, .own_distortion = own, .code_bytes = code_bytes};
        }
    }
    if (bake_off->count == 0)
        return error_set(err, ERR_INVALID, "a %s code of %u bytes for %u dimensions%s %s",
                         code_kind_name(params->kind), code_bytes, dim,
                         params->own_distortion == CHOICE_YES ? " with own distortion" : "",
                         refusal);
    return 0;
}

/* Replaces a trial's code by one trained on the whole; *units_left is what was announced for such
 * trainings. */
static int train_again(struct code_bake_off *tried, uint32_t which, const struct sample *sample,
                       const struct round *whole, const struct comparison *comparison,
                       struct pool *pool, struct job *job, struct quantiser **trained,
                       uint64_t *units_left, struct error *err)
{
    struct code_trial *trial = &tried->trials[which];

    quantiser_free(trained[which]);
    trained[which] = NULL;
    *units_left -= training_units(trial, sample, whole);
    return train_one(trial, sample, whole, comparison, pool, job, &trained[which], err);
}

/* Trains the codes tried, leaves the kept one in *out and marks it. */
static int hold_bake_off(struct code_bake_off *tried, const struct sample *sample,
                         const struct round *whole, struct pool *pool, struct job *job,
                         struct quantiser **out, struct error *err)
{
    struct quantiser *trained[CODE_TRIALS_MAX] = {NULL};
    struct comparison comparison = {0};
    struct round round = *whole;
    bool again = whole->rows > TRIAL_ROWS; /* the winner, on the whole */
    uint64_t units = 0, last_units = 0;
    uint32_t chosen;
    int rc = -1;

    if (comparison_init(&comparison, sample, pool, err) < 0)
        goto done;
    if (again)
        round = (struct round){TRIAL_ROWS, TRIAL_ITERATIONS,
                               comparison.query_count + comparison.base_count};
    for (uint32_t i = 0; i < tried->count; i++) {
        uint64_t last = again ? training_units(&tried->trials[i], sample, whole) : 0;

        units += training_units(&tried->trials[i], sample, &round);
        last_units = last > last_units ? last : last_units;
    }
    job_phase(job, "train codes", units + 2 * last_units);
    for (uint32_t i = 0; i < tried->count; i++) {
        if (train_one(&tried->trials[i], sample, &round, &comparison, pool, job, &trained[i], err) <
            0)
            goto done;
    }
    tried->base_rows = comparison.base_count;
    tried->queries = comparison.query_count;
    chosen = best_trial(tried->trials, tried->count);
    if (again) {
        uint32_t rival = rival_of(tried->trials, tried->count, chosen);

        last_units *= 2;
        if (train_again(tried, chosen, sample, whole, &comparison, pool, job, trained, &last_units,
                        err) < 0)
            goto done;
        if (rival != chosen) {
            if (train_again(tried, rival, sample, whole, &comparison, pool, job, trained,
                            &last_units, err) < 0)
                goto done;
            chosen = better_of(tried->trials, chosen, rival);
        }
        /* Which they would be was not known when the units were announced. */
        if (job_advance(job, last_units, err) < 0)
            goto done;
    }
    tried->trials[chosen].chosen = true;
    *out = trained[chosen];
    trained[chosen] = NULL;
    rc = 0;
done:
    for (uint32_t i = 0; i < tried->count; i++)
        quantiser_free(trained[i]);
    free(comparison.truth);
    return rc;
}

int quantiser_train(const struct quantiser_params *params, const float *sample, uint32_t count,
                    uint32_t dim, struct pool *pool, struct job *job, struct quantiser **out,
                    struct code_bake_off *bake_off, struct error *err)
{
    struct sample rows = {sample, count, dim, count - count / 2, params->seed};
    uint32_t first_half = count / 2;
    struct round whole = {
        /* A sample too small to halve is partly judged on what it was trained on. */
        .rows = first_half < CODE_VALUES ? CODE_VALUES : first_half,
        .iterations = CODE_TRAIN_ITERATIONS,
        .judged = rows.held_out,
    };
    struct code_bake_off tried = {0};

    if (list_trials(params, count, dim, &tried, err) < 0)
        return -1;
    if (tried.count == 1) {
        job_phase(job, "train codes", training_units(&tried.trials[0], &rows, &whole));
        if (train_one(&tried.trials[0], &rows, &whole, NULL, pool, job, out, err) < 0)
            return -1;
        tried.trials[0].chosen = true;
    } else if (hold_bake_off(&tried, &rows, &whole, pool, job, out, err) < 0) {
        return -1;
    }
    if (bake_off)
        *bake_off = tried;
    return 0;
}

/* ---- stored bytes ---- */

int code_read_floats(const uint8_t *bytes, size_t count, const char *what, float *out,
                     struct error *err)
{
    for (size_t i = 0; i < count; i++) {
        out[i] = load_f32(bytes + i * sizeof *out);
        if (!isfinite(out[i]))
            return error_set(err, ERR_CORRUPT, "%s %zu of the quantiser is not finite", what, i);
    }
    return 0;
}

int code_read_halves(const uint8_t *bytes, size_t count, const char *what, uint16_t *out,
                     struct error *err)
{
    for (size_t i = 0; i < count; i++) {
        out[i] = load_u16(bytes + i * sizeof *out);
        if ((out[i] & 0x7c00) == 0x7c00)
            return error_set(err, ERR_CORRUPT, "%s %zu of the quantiser is not finite", what, i);
    }
    return 0;
}

void code_write_floats(uint8_t *bytes, const float *numbers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        store_f32(bytes + i * sizeof *numbers, numbers[i]);
}

void code_write_halves(uint8_t *bytes, const uint16_t *numbers, size_t count)
{
    for (size_t i = 0; i < count; i++)
        store_u16(bytes + i * sizeof *numbers, numbers[i]);
}

static uint32_t stored_crc(const uint8_t *data, size_t bytes)
{
    static const uint8_t zero[4];
    uint32_t crc = crc32c(0, data, HEADER_CRC);

    crc = crc32c(crc, zero, sizeof zero);
    return crc32c(crc, data + HEADER_CRC + sizeof zero, bytes - HEADER_CRC - sizeof zero);
}

int quantiser_encode_bytes(const struct quantiser *quantiser, uint8_t **out, size_t *bytes,
                           struct error *err)
{
    const struct code_methods *methods = quantiser->methods;
    size_t size = HEADER_SIZE + methods->stored_bytes(quantiser->dim, chunk_count(quantiser));
    uint8_t *data = calloc(1, size);

    if (!data)
        return error_set(err, ERR_NOMEM, "no memory for a quantiser of %zu bytes", size);
    memcpy(data + HEADER_MAGIC, quantiser_magic, sizeof quantiser_magic);
    store_u32(data + HEADER_VERSION, quantiser_version);
    store_u64(data + HEADER_BYTES_ALL, size);
    store_u32(data + HEADER_KIND, (uint32_t)methods->kind);
    store_u32(data + HEADER_DIM, quantiser->dim);
    store_u32(data + HEADER_CODE_BYTES, quantiser->code_bytes);
    store_f32(data + HEADER_DISTORTION, quantiser->distortion);
    store_u32(data + HEADER_OWN, quantiser->own);
    store_f32(data + HEADER_OWN_LEAST, quantiser->own_least);
    store_f32(data + HEADER_OWN_RATIO, quantiser->own_ratio);
    methods->write(quantiser->code, data + HEADER_SIZE);
    store_u32(data + HEADER_CRC, stored_crc(data, size));
    *out = data;
    *bytes = size;
    return 0;
}

/* What can be wrong with the header; the code's numbers are for its method to check. */
static int check_stored(const uint8_t *data, size_t bytes, const char *where, struct error *err)
{
    const struct code_methods *methods;
    uint32_t version, kind, dim, code_bytes, own;
    uint64_t wanted;

    if (bytes < HEADER_SIZE)
        return error_set(err, ERR_CORRUPT, "%s: a quantiser wants at least %d bytes, found %zu",
                         where, HEADER_SIZE, bytes);
    if (memcmp(data + HEADER_MAGIC, quantiser_magic, sizeof quantiser_magic) != 0)
        return error_set(err, ERR_CORRUPT, "%s: no quantiser, its magic is wrong", where);
    version = load_u32(data + HEADER_VERSION);
    if (version != quantiser_version)
        return error_set(err, ERR_UNSUPPORTED, "%s: quantiser version %u, this program reads %u",
                         where, version, quantiser_version);
    if (load_u64(data + HEADER_BYTES_ALL) != bytes)
        return error_set(err, ERR_CORRUPT, "%s: quantiser of %llu bytes, found %zu", where,
                         (unsigned long long)load_u64(data + HEADER_BYTES_ALL), bytes);
    if (stored_crc(data, bytes) != load_u32(data + HEADER_CRC))
        return error_set(err, ERR_CORRUPT, "%s: quantiser checksum %08x, computed %08x", where,
                         load_u32(data + HEADER_CRC), stored_crc(data, bytes));
    /* The checksum says the writer meant this; the writer may still be hostile. */
    kind = load_u32(data + HEADER_KIND);
    dim = load_u32(data + HEADER_DIM);
    code_bytes = load_u32(data + HEADER_CODE_BYTES);
    own = load_u32(data + HEADER_OWN);
    methods = methods_of(kind);
    if (!methods)
        return error_set(err, ERR_UNSUPPORTED, "%s: quantiser of unknown kind %u", where, kind);
    if (own > 1)
        return error_set(err, ERR_CORRUPT, "%s: quantiser with own distortion %u", where, own);
    if (dim == 0 || dim > DISTANCE_DIM_MAX || code_bytes == 0 ||
        shape_refused(methods, own, dim, code_bytes))
        return error_set(err, ERR_CORRUPT, "%s: %s quantiser of %u dimensions in %u bytes", where,
                         methods->name, dim, code_bytes);
    wanted = HEADER_SIZE + methods->stored_bytes(dim, code_bytes - own);
    if (wanted != bytes)
        return error_set(err, ERR_CORRUPT,
                         "%s: %s quantiser of %u dimensions in %u bytes wants %llu bytes, found "
                         "%zu",
                         where, methods->name, dim, code_bytes, (unsigned long long)wanted, bytes);
    for (size_t i = HEADER_RESERVED; i < HEADER_SIZE; i++) {
        if (data[i] != 0)
            return error_set(err, ERR_CORRUPT, "%s: quantiser's reserved byte %zu is not zero",
                             where, i);
    }
    if (!isfinite(load_f32(data + HEADER_DISTORTION)) || load_f32(data + HEADER_DISTORTION) < 0)
        return error_set(err, ERR_CORRUPT, "%s: quantiser's distortion is %g", where,
                         (double)load_f32(data + HEADER_DISTORTION));
    return 0;
}

/* The scale of own distortions, or zeros where there are none. */
static int read_own_scale(struct quantiser *quantiser, const uint8_t *data, struct error *err)
{
    float least = load_f32(data + HEADER_OWN_LEAST);
    float ratio = load_f32(data + HEADER_OWN_RATIO);
    bool right;

    if (quantiser->own)
        right = least >= 0 && ratio >= 1 && own_scale_set(quantiser, least, ratio);
    else
        right = load_u32(data + HEADER_OWN_LEAST) == 0 && load_u32(data + HEADER_OWN_RATIO) == 0;
    if (!right)
        return error_set(err, ERR_CORRUPT, "the quantiser's own distortions go from %g by %g",
                         (double)least, (double)ratio);
    return 0;
}

int quantiser_decode_bytes(const uint8_t *data, size_t bytes, const char *where,
                           struct quantiser **out, struct error *err)
{
    struct quantiser *quantiser;

    if (check_stored(data, bytes, where, err) < 0)
        return -1;
    quantiser = calloc(1, sizeof *quantiser);
    if (!quantiser)
        return error_set(err, ERR_NOMEM, "no memory for a quantiser");
    quantiser->methods = methods_of(load_u32(data + HEADER_KIND));
    quantiser->dim = load_u32(data + HEADER_DIM);
    quantiser->code_bytes = load_u32(data + HEADER_CODE_BYTES);
    quantiser->distortion = load_f32(data + HEADER_DISTORTION);
    quantiser->own = load_u32(data + HEADER_OWN) == 1;
    if (read_own_scale(quantiser, data, err) < 0 ||
        quantiser->methods->read(data + HEADER_SIZE, quantiser->dim, chunk_count(quantiser),
                                 &quantiser->code, err) < 0) {
        error_prefix(err, "%s", where);
        quantiser_free(quantiser);
        return -1;
    }
    *out = quantiser;
    return 0;
}
