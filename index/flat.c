/* One pass over the base keeps, per query, the k + MARGIN nearest by float kernels in a binary heap
 * (worst on top). A second look at just those rows computes their distances in double and sorts:
 * the margin covers what float rounding may have put in the wrong order around rank k. */
#include "index/flat.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/store.h"

#define MARGIN 64u
#define BLOCK_BYTES (4u << 20)

struct near {
    float distance; /* smaller is nearer, whatever the metric */
    uint32_t row;
};

struct ranked {
    double distance;
    uint32_t row;
};

struct scan {
    const struct vector_source *base;
    const float *queries;
    enum metric metric;
    uint32_t dim;
    uint32_t row_bytes;
    uint32_t heap_max;
    struct near *heaps; /* query_count x heap_max */
    uint32_t *heap_counts;
    struct store_query *prepared;
    const uint8_t *rows; /* one block, as stored by `store` */
    uint32_t row_stride;
    uint64_t first_row;
    uint32_t row_count;
};

static bool nearer(const struct near *a, const struct near *b)
{
    return a->distance < b->distance || (a->distance == b->distance && a->row < b->row);
}

static void heap_offer(struct near *heap, uint32_t *count, uint32_t max, struct near item)
{
    uint32_t i;

    if (*count < max) {
        i = (*count)++;
        for (; i > 0 && nearer(&heap[(i - 1) / 2], &item); i = (i - 1) / 2)
            heap[i] = heap[(i - 1) / 2];
        heap[i] = item;
        return;
    }
    if (!nearer(&item, &heap[0]))
        return;
    for (i = 0;;) {
        uint32_t child = 2 * i + 1;

        if (child >= max)
            break;
        if (child + 1 < max && nearer(&heap[child], &heap[child + 1]))
            child++;
        if (!nearer(&item, &heap[child]))
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = item;
}

static void scan_queries(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct scan *s = context;

    (void)worker;
    for (uint64_t q = begin; q < end; q++) {
        struct near *heap = s->heaps + q * s->heap_max;

        for (uint32_t i = 0; i < s->row_count; i++) {
            const struct near item = {
                store_distance(&s->prepared[q], s->rows + (uint64_t)i * s->row_stride),
                (uint32_t)(s->first_row + i)};

            if (s->heap_counts[q] < s->heap_max || item.distance <= heap[0].distance)
                heap_offer(heap, &s->heap_counts[q], s->heap_max, item);
        }
    }
}

struct encode {
    enum vector_store store;
    enum metric metric;
    uint32_t dim;
    float *rows; /* normalised in place for cosine */
    uint8_t *out;
    uint32_t stride;
};

static void encode_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct encode *e = context;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        float *row = e->rows + i * e->dim;

        if (e->metric == METRIC_COSINE && e->store == STORE_F32)
            vector_normalise(row, e->dim);
        store_encode(e->store, e->metric, row, e->dim, e->out + i * e->stride);
    }
}

static double exact_distance(enum metric metric, const float *q, const float *x, uint32_t dim)
{
    double ip = 0, qq = 0, xx = 0, l2 = 0;

    for (uint32_t d = 0; d < dim; d++) {
        double a = q[d], b = x[d];

        ip += a * b;
        qq += a * a;
        xx += b * b;
        l2 += (a - b) * (a - b);
    }
    if (metric == METRIC_L2)
        return l2;
    if (metric == METRIC_IP)
        return -ip;
    return qq > 0 && xx > 0 ? 1 - ip / sqrt(qq * xx) : 1;
}

static int compare_ranked(const void *a, const void *b)
{
    const struct ranked *x = a, *y = b;

    if (x->distance != y->distance)
        return x->distance < y->distance ? -1 : 1;
    return (x->row > y->row) - (x->row < y->row);
}

struct rank {
    const struct scan *scan;
    uint32_t k;
    struct truth *out;
    struct error error;
    bool failed;
};

static void rank_queries(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct rank *r = context;
    const struct scan *s = r->scan;
    struct error err = ERROR_INIT;
    struct ranked *ranked = malloc(s->heap_max * sizeof *ranked);
    float *row = malloc(s->dim * sizeof *row);

    (void)worker;
    if (!ranked || !row)
        error_set(&err, ERR_NOMEM, "no memory to rank neighbours");
    for (uint64_t q = begin; q < end && !err.code; q++) {
        uint32_t count = s->heap_counts[q];

        for (uint32_t i = 0; i < count; i++) {
            ranked[i].row = s->heaps[q * s->heap_max + i].row;
            if (vector_source_read_f32(s->base, ranked[i].row, 1, row, &err) < 0)
                break;
            ranked[i].distance = exact_distance(s->metric, s->queries + q * s->dim, row, s->dim);
        }
        qsort(ranked, count, sizeof *ranked, compare_ranked);
        for (uint32_t i = 0; i < r->k; i++) {
            double distance = ranked[i].distance;

            r->out->ids[q * r->k + i] = ranked[i].row;
            r->out->distances[q * r->k + i] =
                (float)(s->metric == METRIC_IP ? -distance : distance);
        }
    }
    if (err.code && !__atomic_exchange_n(&r->failed, true, __ATOMIC_ACQ_REL))
        r->error = err;
    free(ranked);
    free(row);
}

int flat_truth(const struct vector_source *base, const float *queries, uint32_t query_count,
               uint32_t k, enum metric metric, struct pool *pool, struct job *job,
               struct truth *out, struct error *err)
{
    uint64_t rows = vector_source_rows(base);
    uint32_t dim = vector_source_dim(base);
    enum element_type type = vector_source_type(base);
    enum vector_store store = type == ELEMENT_U8   ? STORE_U8
                              : type == ELEMENT_I8 ? STORE_I8
                                                   : STORE_F32;
    uint32_t stride = store_vector_bytes(store, metric, dim);
    uint32_t block_rows = BLOCK_BYTES / (dim * 4) ? BLOCK_BYTES / (dim * 4) : 1;
    struct scan s = {.base = base,
                     .queries = queries,
                     .metric = metric,
                     .dim = dim,
                     .row_bytes = vector_source_row_bytes(base),
                     .heap_max = k + MARGIN,
                     .row_stride = stride};
    float *vectors = NULL, *query_vectors = NULL;
    uint8_t *query_integers = NULL, *encoded = NULL;
    int rc = -1;

    memset(out, 0, sizeof *out);
    if (k < 1 || k > rows)
        return error_set(err, ERR_INVALID, "k is %u; %s has %llu rows", k, vector_source_name(base),
                         (unsigned long long)rows);
    if (rows > UINT32_MAX)
        return error_set(err, ERR_INVALID, "%s has %llu rows; truth ids have 32 bits",
                         vector_source_name(base), (unsigned long long)rows);
    s.heaps = malloc((uint64_t)query_count * s.heap_max * sizeof *s.heaps);
    s.heap_counts = calloc(query_count, sizeof *s.heap_counts);
    s.prepared = calloc(query_count, sizeof *s.prepared);
    query_vectors = malloc((uint64_t)query_count * dim * sizeof *query_vectors);
    query_integers = malloc((uint64_t)query_count * dim);
    vectors = malloc((uint64_t)block_rows * dim * sizeof *vectors);
    encoded = malloc((uint64_t)block_rows * stride);
    out->ids = malloc((uint64_t)query_count * k * sizeof *out->ids);
    out->distances = malloc((uint64_t)query_count * k * sizeof *out->distances);
    if (!s.heaps || !s.heap_counts || !s.prepared || !query_vectors || !query_integers ||
        !vectors || !encoded || !out->ids || !out->distances) {
        error_set(err, ERR_NOMEM, "no memory for %u queries and k %u", query_count, k);
        goto done;
    }
    out->query_count = query_count;
    out->k = k;
    for (uint32_t q = 0; q < query_count; q++) {
        s.prepared[q].vector = query_vectors + (uint64_t)q * dim;
        s.prepared[q].integers = query_integers + (uint64_t)q * dim;
        store_query_prepare(&s.prepared[q], distance_kernels_best(), store, metric, dim,
                            queries + (uint64_t)q * dim);
    }
    job_phase(job, "scan", rows);
    for (uint64_t first = 0; first < rows; first += block_rows) {
        uint32_t count = rows - first < block_rows ? (uint32_t)(rows - first) : block_rows;
        struct encode encode = {store, metric, dim, vectors, encoded, stride};

        if (vector_source_read_f32(base, first, count, vectors, err) < 0 ||
            vector_check_finite(vectors, first, count, dim, err) < 0)
            goto done;
        pool_for(pool, count, 256, encode_rows, &encode);
        s.rows = encoded;
        s.first_row = first;
        s.row_count = count;
        pool_for(pool, query_count, 4, scan_queries, &s);
        if (job_advance(job, count, err) < 0)
            goto done;
    }
    struct rank rank = {.scan = &s, .k = k, .out = out};

    job_phase(job, "rank", 0);
    pool_for(pool, query_count, 4, rank_queries, &rank);
    if (rank.failed) {
        *err = rank.error;
        goto done;
    }
    job_finish(job);
    rc = 0;
done:
    free(s.heaps);
    free(s.heap_counts);
    free(s.prepared);
    free(query_vectors);
    free(query_integers);
    free(vectors);
    free(encoded);
    if (rc < 0)
        truth_release(out);
    return rc;
}
