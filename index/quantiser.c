/* Checks, the loop over the pool and the stored bytes; the codes themselves are tables of methods
 * (code_methods.h). Codes are trained on the first half of the sample and judged on the second, so
 * that the distortion, and CODE_AUTO's choice by it, is that of vectors training has not seen.
 *
 * Stored form, little-endian: a header of 64 bytes, then the code's floats. */
#include "index/quantiser.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#include "index/code_methods.h"
#include "index/distance.h"
#include "index/opq.h"
#include "index/pq.h"
#include "index/scalar_code.h"
#include "storage/base/bytes.h"

#define ENCODE_GRAIN (8u * CODE_BLOCK)
#define SCRATCH_FLOATS_MIN 16u /* so that a caller's malloc of the scratch is never of nothing */

static const char quantiser_magic[8] = "ANNDQNT1";
static const uint32_t quantiser_version = 1;

/* Offsets in the header. */
enum {
    HEADER_MAGIC = 0,       /* 00-07 */
    HEADER_VERSION = 8,     /* 08-11 */
    HEADER_CRC = 12,        /* 12-15 CRC-32C of header and floats, this field as zero */
    HEADER_BYTES_ALL = 16,  /* 16-23 header and floats */
    HEADER_KIND = 24,       /* 24-27 enum code_kind, never CODE_AUTO */
    HEADER_DIM = 28,        /* 28-31 */
    HEADER_CODE_BYTES = 32, /* 32-35 */
    HEADER_DISTORTION = 36, /* 36-39 float */
    HEADER_RESERVED = 40,   /* 40-63 zero */
    HEADER_SIZE = 64
};

struct quantiser {
    const struct code_methods *methods;
    void *code;
    uint32_t dim;
    uint32_t code_bytes;
    float distortion;
};

/* Also the order in which CODE_AUTO tries them: of equals the first stays. */
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

uint64_t quantiser_memory_bytes(const struct quantiser *quantiser)
{
    return sizeof *quantiser + quantiser->methods->memory_bytes(quantiser->code);
}

size_t quantiser_table_floats(const struct quantiser *quantiser)
{
    return quantiser->methods->table_floats(quantiser->code);
}

size_t quantiser_scratch_floats(const struct quantiser *quantiser)
{
    return SCRATCH_FLOATS_MIN + quantiser->methods->scratch_floats(quantiser->code);
}

void quantiser_table(const struct quantiser *quantiser, enum metric metric, const float *query,
                     float *scratch, float *table)
{
    quantiser->methods->table(quantiser->code, metric, query, scratch, table);
}

void quantiser_estimate(const struct quantiser *quantiser, const float *table, const uint8_t *codes,
                        const uint32_t *rows, uint32_t count, float *out)
{
    quantiser->methods->estimate(quantiser->code, table, codes, rows, count, out);
}

void quantiser_decode(const struct quantiser *quantiser, const uint8_t *code, float *vector)
{
    quantiser->methods->decode(quantiser->code, code, vector);
}

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
    float *scratch = work->scratch + worker * work->scratch_floats;

    for (uint64_t i = begin; i < end; i += CODE_BLOCK) {
        uint32_t count = end - i < CODE_BLOCK ? (uint32_t)(end - i) : CODE_BLOCK;

        quantiser->methods->encode_block(quantiser->code, work->vectors + i * quantiser->dim, count,
                                         scratch, work->codes + i * quantiser->code_bytes,
                                         work->errors ? work->errors + i : NULL);
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

/* Sets the mean squared error over count vectors. */
static int measure_distortion(struct quantiser *quantiser, const float *vectors, uint32_t count,
                              struct pool *pool, struct error *err)
{
    uint8_t *codes = malloc((size_t)count * quantiser->code_bytes);
    float *errors = malloc(count * sizeof *errors);
    double sum = 0;
    int rc = -1;

    if (!codes || !errors) {
        error_set(err, ERR_NOMEM, "no memory to measure a code on %u vectors", count);
        goto done;
    }
    if (encode_with_errors(quantiser, vectors, count, pool, codes, errors, err) < 0)
        goto done;
    for (uint32_t i = 0; i < count; i++)
        sum += errors[i];
    quantiser->distortion = (float)(sum / count);
    if (!isfinite(quantiser->distortion)) {
        error_set(err, ERR_INVALID,
                  "the sample's values are too large for squared distances in float, or not "
                  "finite");
        goto done;
    }
    rc = 0;
done:
    free(codes);
    free(errors);
    return rc;
}

static int train_kind(const struct code_methods *methods, const struct code_training *sample,
                      struct pool *pool, struct job *job, struct quantiser **out, struct error *err)
{
    struct code_training training = *sample;
    uint32_t half = sample->count / 2;
    struct quantiser *quantiser = calloc(1, sizeof *quantiser);

    if (!quantiser)
        return error_set(err, ERR_NOMEM, "no memory for a quantiser");
    quantiser->methods = methods;
    quantiser->dim = sample->dim;
    quantiser->code_bytes = sample->code_bytes;
    /* A sample too small to halve is partly judged on what it was trained on. */
    training.count = half < PQ_CENTROIDS ? PQ_CENTROIDS : half;
    if (methods->train(&training, pool, job, &quantiser->code, err) < 0 ||
        measure_distortion(quantiser, sample->sample + (size_t)half * sample->dim,
                           sample->count - half, pool, err) < 0) {
        quantiser_free(quantiser);
        return -1;
    }
    *out = quantiser;
    return 0;
}

/* Whether a kind takes part: the one asked for, or under CODE_AUTO each that can. */
static bool kind_runs(const struct code_methods *methods, enum code_kind kind, uint32_t dim,
                      uint32_t code_bytes)
{
    if (kind != CODE_AUTO)
        return methods->kind == kind;
    if (methods->kind == CODE_OPQ && dim > OPQ_DIM_AUTO_MAX)
        return false;
    return !methods->refuses(dim, code_bytes);
}

static int check_shape(enum code_kind kind, uint32_t count, uint32_t dim, uint32_t code_bytes,
                       struct error *err)
{
    const struct code_methods *methods = methods_of(kind);
    const char *refusal = methods ? methods->refuses(dim, code_bytes) : NULL;

    if (kind != CODE_AUTO && !methods)
        return error_set(err, ERR_INVALID, "%d is no kind of code", (int)kind);
    if (dim == 0 || dim > DISTANCE_DIM_MAX)
        return error_set(err, ERR_INVALID, "codes want 1 to %u dimensions, found %u",
                         DISTANCE_DIM_MAX, dim);
    if (code_bytes == 0 || code_bytes > dim)
        return error_set(err, ERR_INVALID,
                         "codes of %u-dimensional vectors want 1 to %u bytes, "
                         "found %u",
                         dim, dim, code_bytes);
    if (count < PQ_CENTROIDS)
        return error_set(err, ERR_INVALID, "training a code wants at least %u vectors, found %u",
                         PQ_CENTROIDS, count);
    if (refusal)
        return error_set(err, ERR_INVALID, "a %s code of %u bytes for %u dimensions %s",
                         methods->name, code_bytes, dim, refusal);
    if (kind == CODE_SCALAR && code_bytes != dim && code_bytes != dim / 2 + dim % 2)
        return error_set(err, ERR_INVALID,
                         "a scalar code of %u dimensions wants %u bytes (4 bits each) or %u (8 "
                         "bits), found %u",
                         dim, dim / 2 + dim % 2, dim, code_bytes);
    return 0;
}

int quantiser_train(enum code_kind kind, const float *sample, uint32_t count, uint32_t dim,
                    uint32_t code_bytes, uint64_t seed, struct pool *pool, struct job *job,
                    struct quantiser **out, struct error *err)
{
    struct code_training training = {sample, count, dim, code_bytes, seed};
    struct quantiser *best = NULL;
    uint64_t units = 0;
    int rc = -1;

    if (check_shape(kind, count, dim, code_bytes, err) < 0)
        return -1;
    for (size_t i = 0; i < METHODS_COUNT; i++) {
        if (kind_runs(all_methods[i], kind, dim, code_bytes))
            units += all_methods[i]->train_units(dim, code_bytes);
    }
    job_phase(job, "train codes", units);
    for (size_t i = 0; i < METHODS_COUNT; i++) {
        struct quantiser *quantiser = NULL;

        if (!kind_runs(all_methods[i], kind, dim, code_bytes))
            continue;
        if (train_kind(all_methods[i], &training, pool, job, &quantiser, err) < 0)
            goto done;
        if (!best || quantiser->distortion < best->distortion) {
            quantiser_free(best);
            best = quantiser;
        } else {
            quantiser_free(quantiser);
        }
    }
    *out = best;
    best = NULL;
    rc = 0;
done:
    quantiser_free(best);
    return rc;
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
    uint64_t floats = methods->stored_floats(quantiser->dim, quantiser->code_bytes);
    size_t size = HEADER_SIZE + floats * sizeof(float);
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
    methods->write(quantiser->code, data + HEADER_SIZE);
    store_u32(data + HEADER_CRC, stored_crc(data, size));
    *out = data;
    *bytes = size;
    return 0;
}

/* Everything about the bytes that can be wrong; nothing of them is used before. */
static int check_stored(const uint8_t *data, size_t bytes, const char *where, struct error *err)
{
    const struct code_methods *methods;
    uint32_t version, kind, dim, code_bytes;
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
    methods = methods_of(kind);
    if (!methods)
        return error_set(err, ERR_UNSUPPORTED, "%s: quantiser of unknown kind %u", where, kind);
    if (dim == 0 || dim > DISTANCE_DIM_MAX || code_bytes == 0 || code_bytes > dim ||
        methods->refuses(dim, code_bytes))
        return error_set(err, ERR_CORRUPT, "%s: %s quantiser of %u dimensions in %u bytes", where,
                         methods->name, dim, code_bytes);
    wanted = HEADER_SIZE + methods->stored_floats(dim, code_bytes) * sizeof(float);
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
    if (!isfinite(load_f32(data + HEADER_DISTORTION)))
        return error_set(err, ERR_CORRUPT, "%s: quantiser's distortion is not finite", where);
    for (size_t i = HEADER_SIZE; i < bytes; i += sizeof(float)) {
        if (!isfinite(load_f32(data + i)))
            return error_set(err, ERR_CORRUPT, "%s: quantiser's number at byte %zu is not finite",
                             where, i);
    }
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
    if (quantiser->methods->read(data + HEADER_SIZE, quantiser->dim, quantiser->code_bytes,
                                 &quantiser->code, err) < 0) {
        error_prefix(err, "%s", where);
        quantiser_free(quantiser);
        return -1;
    }
    *out = quantiser;
    return 0;
}
