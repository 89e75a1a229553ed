/* Each chunk is a k-means of its own. Its centroids are kept as a centroid_table, relative to their
 * mean and one column each: the layout serves encoding (nearest column), lookup tables (distances
 * to all columns at once) and, transposed back, decoding. Of an inner product the mean's share is
 * the same for all centroids of a chunk and goes into the table as a constant. */
#include "index/pq.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "index/code_kernels.h"
#include "index/distance.h"
#include "index/kmeans.h"
#include "storage/base/bytes.h"

static_assert(CODE_BLOCK <= CENTROID_BLOCK, "a block goes to centroid_nearest in one call");

struct pq {
    uint32_t dim;
    uint32_t chunk_count;
    struct centroid_table *chunks; /* chunk_count */
};

uint32_t pq_chunk_begin(uint32_t dim, uint32_t chunk_count, uint32_t chunk)
{
    uint32_t longer = dim % chunk_count;

    return chunk * (dim / chunk_count) + (chunk < longer ? chunk : longer);
}

static uint32_t chunk_begin(const struct pq *pq, uint32_t chunk)
{
    return pq_chunk_begin(pq->dim, pq->chunk_count, chunk);
}

static void pq_free(void *code)
{
    struct pq *pq = code;

    if (!pq)
        return;
    for (uint32_t c = 0; pq->chunks && c < pq->chunk_count; c++)
        centroid_table_release(&pq->chunks[c]);
    free(pq->chunks);
    free(pq);
}

static struct pq *pq_new(uint32_t dim, uint32_t chunk_count, struct error *err)
{
    struct pq *pq = calloc(1, sizeof *pq);

    if (!pq)
        goto fail;
    pq->dim = dim;
    pq->chunk_count = chunk_count;
    pq->chunks = calloc(chunk_count, sizeof *pq->chunks);
    if (!pq->chunks)
        goto fail;
    return pq;
fail:
    pq_free(pq);
    error_set(err, ERR_NOMEM, "no memory for a product quantiser of %u chunks", chunk_count);
    return NULL;
}

static const char *pq_refuses(uint32_t dim, uint32_t code_bytes)
{
    return code_bytes > dim ? "has more bytes than dimensions" : NULL;
}

static uint64_t pq_train_units(uint32_t dim, uint32_t code_bytes)
{
    (void)dim;
    return (uint64_t)code_bytes * CODE_TRAIN_ITERATIONS;
}

static int pq_train(const struct code_training *training, struct pool *pool, struct job *job,
                    void **out, struct error *err)
{
    uint32_t dim = training->dim;
    uint32_t chunk_count = training->code_bytes;
    uint32_t chunk_dim_max = pq_chunk_begin(dim, chunk_count, 1);
    struct pq *pq = pq_new(dim, chunk_count, err);
    float *points = NULL, *centroids = NULL;
    int rc = -1;

    if (!pq)
        return -1;
    points = malloc((size_t)training->count * chunk_dim_max * sizeof *points);
    centroids = malloc((size_t)PQ_CENTROIDS * chunk_dim_max * sizeof *centroids);
    if (!points || !centroids) {
        error_set(err, ERR_NOMEM, "no memory to train %u chunks on %u vectors", chunk_count,
                  training->count);
        goto done;
    }
    for (uint32_t c = 0; c < chunk_count; c++) {
        uint32_t begin = chunk_begin(pq, c);
        uint32_t chunk_dim = chunk_begin(pq, c + 1) - begin;
        struct kmeans_params params = {
            .points = points,
            .stride = chunk_dim,
            .count = training->count,
            .dim = chunk_dim,
            .cluster_count = PQ_CENTROIDS,
            .iterations = CODE_TRAIN_ITERATIONS,
            .seed = training->seed,
            .stream = c,
        };

        /* Dense, the chunk stays in the second cache for all the steps. */
        for (uint32_t i = 0; i < training->count; i++)
            memcpy(points + (size_t)i * chunk_dim, training->sample + (size_t)i * dim + begin,
                   chunk_dim * sizeof *points);
        if (kmeans_train(&params, pool, job, centroids, err) < 0 ||
            centroid_table_init(&pq->chunks[c], centroids, PQ_CENTROIDS, chunk_dim, err) < 0)
            goto done;
    }
    *out = pq;
    pq = NULL;
    rc = 0;
done:
    free(points);
    free(centroids);
    pq_free(pq);
    return rc;
}

static uint64_t pq_memory_bytes(const void *code)
{
    const struct pq *pq = code;
    uint64_t floats = (uint64_t)pq->dim * (PQ_CENTROIDS + 1) +  /* columns and means */
                      (uint64_t)pq->chunk_count * PQ_CENTROIDS; /* norms */

    return sizeof *pq + pq->chunk_count * sizeof *pq->chunks + floats * sizeof(float);
}

static size_t pq_encode_scratch_floats(const void *code)
{
    const struct pq *pq = code;

    return centroid_scratch_floats(&pq->chunks[0]); /* the first chunk is the longest */
}

static void pq_encode_block(const void *code, const float *vectors, uint32_t count, float *scratch,
                            uint8_t *codes, float *errors)
{
    const struct pq *pq = code;
    uint32_t ids[CODE_BLOCK];
    float distances[CODE_BLOCK];

    if (errors)
        memset(errors, 0, count * sizeof *errors);
    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        centroid_nearest(&pq->chunks[c], vectors + chunk_begin(pq, c), pq->dim, count, scratch, ids,
                         errors ? distances : NULL);
        for (uint32_t i = 0; i < count; i++)
            codes[(size_t)i * pq->chunk_count + c] = (uint8_t)ids[i];
        for (uint32_t i = 0; errors && i < count; i++)
            errors[i] += distances[i];
    }
}

static void pq_decode(const void *code, const uint8_t *bytes, float *vector)
{
    const struct pq *pq = code;

    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        const struct centroid_table *chunk = &pq->chunks[c];
        float *part = vector + chunk_begin(pq, c);

        for (uint32_t d = 0; d < chunk->dim; d++)
            part[d] = chunk->mean[d] + chunk->columns[(size_t)d * chunk->stride + bytes[c]];
    }
}

static size_t pq_table_floats(const void *code)
{
    const struct pq *pq = code;

    return (size_t)pq->chunk_count * PQ_CENTROIDS;
}

static size_t pq_scratch_floats(const void *code)
{
    const struct pq *pq = code;

    return pq_chunk_begin(pq->dim, pq->chunk_count, 1); /* a chunk of the query */
}

static void pq_table(const void *code, enum metric metric, const float *query, float *scratch,
                     float *table)
{
    const struct pq *pq = code;
    const struct code_kernels *kernels = code_kernels_best();

    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        const struct centroid_table *chunk = &pq->chunks[c];
        const float *part = query + chunk_begin(pq, c);
        float *row = table + (size_t)c * PQ_CENTROIDS;

        if (metric == METRIC_L2) {
            for (uint32_t d = 0; d < chunk->dim; d++)
                scratch[d] = part[d] - chunk->mean[d];
            kernels->l2_columns(scratch, chunk->dim, chunk->columns, chunk->stride, PQ_CENTROIDS,
                                row);
        } else {
            float base = 0;

            for (uint32_t d = 0; d < chunk->dim; d++)
                base -= part[d] * chunk->mean[d];
            kernels->dot_columns(part, chunk->dim, chunk->columns, chunk->stride, PQ_CENTROIDS,
                                 base, -1.0f, row);
        }
    }
}

static void pq_estimate(const void *code, const float *table, const uint8_t *codes,
                        const uint32_t *rows, uint32_t count, float *out)
{
    const struct pq *pq = code;

    distance_kernels_best()->adc_rows(table, pq->chunk_count, codes, pq->chunk_count, rows, count,
                                      out);
}

static uint64_t pq_stored_floats(uint32_t dim, uint32_t code_bytes)
{
    (void)code_bytes;
    return (uint64_t)dim * (PQ_CENTROIDS + 1);
}

/* Chunk after chunk: its mean, then its columns as they are in memory. */
static void pq_write(const void *code, uint8_t *bytes)
{
    const struct pq *pq = code;

    for (uint32_t c = 0; c < pq->chunk_count; c++) {
        const struct centroid_table *chunk = &pq->chunks[c];
        size_t floats = (size_t)chunk->dim * PQ_CENTROIDS;

        for (uint32_t d = 0; d < chunk->dim; d++, bytes += sizeof(float))
            store_f32(bytes, chunk->mean[d]);
        for (size_t i = 0; i < floats; i++, bytes += sizeof(float))
            store_f32(bytes, chunk->columns[i]);
    }
}

static int pq_read(const uint8_t *bytes, uint32_t dim, uint32_t code_bytes, void **out,
                   struct error *err)
{
    struct pq *pq = pq_new(dim, code_bytes, err);
    uint32_t chunk_dim_max = pq_chunk_begin(dim, code_bytes, 1);
    float *zeros = NULL;
    int rc = -1;

    if (!pq)
        return -1;
    zeros = calloc((size_t)PQ_CENTROIDS * chunk_dim_max, sizeof *zeros);
    if (!zeros) {
        error_set(err, ERR_NOMEM, "no memory to read a product quantiser of %u chunks", code_bytes);
        goto done;
    }
    for (uint32_t c = 0; c < code_bytes; c++) {
        struct centroid_table *chunk = &pq->chunks[c];
        uint32_t chunk_dim = chunk_begin(pq, c + 1) - chunk_begin(pq, c);
        size_t floats = (size_t)chunk_dim * PQ_CENTROIDS;

        if (centroid_table_init(chunk, zeros, PQ_CENTROIDS, chunk_dim, err) < 0)
            goto done;
        for (uint32_t d = 0; d < chunk_dim; d++, bytes += sizeof(float))
            chunk->mean[d] = load_f32(bytes);
        for (size_t i = 0; i < floats; i++, bytes += sizeof(float))
            chunk->columns[i] = load_f32(bytes);
        centroid_table_norms(chunk);
    }
    *out = pq;
    pq = NULL;
    rc = 0;
done:
    free(zeros);
    pq_free(pq);
    return rc;
}

const struct code_methods pq_methods = {
    .kind = CODE_PQ,
    .name = "pq",
    .refuses = pq_refuses,
    .train_units = pq_train_units,
    .train = pq_train,
    .free = pq_free,
    .memory_bytes = pq_memory_bytes,
    .encode_scratch_floats = pq_encode_scratch_floats,
    .encode_block = pq_encode_block,
    .decode = pq_decode,
    .table_floats = pq_table_floats,
    .scratch_floats = pq_scratch_floats,
    .table = pq_table,
    .estimate = pq_estimate,
    .stored_floats = pq_stored_floats,
    .write = pq_write,
    .read = pq_read,
};
