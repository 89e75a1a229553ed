/* How it works: rows are inserted in a seeded random order, cut into batches that double up to a
 * bound. One batch:
 *
 *   1. every row of it searches the graph as the batches before left it, prunes what the search
 *      went through to its own list, and counts each neighbour it chose (in parallel: nobody can
 *      reach a row of the batch yet, so its list is its own);
 *   2. the counts become offsets, and every row drops its number into its neighbours' slots;
 *   3. every row that was chosen sorts its slots and takes the choosers into its list, pruning when
 *      the list outgrows its slack (in parallel: one row, one owner).
 *
 * Nothing depends on which thread does what or when: step 1 reads only finished batches, and the
 * races for slots in step 2 end in the sorting of step 3.
 *
 * Lists may grow to 1.3 times max_degree between prunes, as in DiskANN, which makes one prune serve
 * many additions; at the end all are cut to max_degree and brought into prune order.
 *
 * Memory latency rules the speed, so the rows of a batch, and the lists that are updated, are
 * handled in space order (that of page_layout): successive searches then walk through the same
 * lists and vectors while these are in the cache. The order of work does not touch the result. */
#include "index/vamana.h"

#include <assert.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "index/page_layout.h"
#include "index/vamana_prune.h"
#include "index/vamana_search.h"
#include "storage/base/random.h"

#define MAX_DEGREE_LOWEST 4u
#define MAX_DEGREE_HIGHEST 256u
#define BUILD_LIST_HIGHEST 65536u
#define BATCH_ROWS_LOWEST 64u
#define BATCH_ROWS_HIGHEST (1u << 20)
#define BATCHES_HIGHEST 4200u /* 2^32 rows by BATCH_ROWS_HIGHEST, and the doubling before */
#define INSERT_GRAIN 16u
#define UPDATE_GRAIN 256u
#define MEAN_BLOCKS 64u
#define LOCALITY_ROWS 256u /* space order finer than this brings no more cache hits */
#define HUGE_PAGE_BYTES (2ull << 20)

enum random_stream { STREAM_ORDER = 1 };

struct build_scratch {
    struct search_scratch search;
    struct prune_scratch prune;
};

struct build {
    struct row_space space;
    const struct vector_matrix *vectors;
    const struct vamana_params *params;
    struct pool *pool;
    struct job *job;
    struct graph *graph; /* max_degree is the slack degree until the end */
    uint32_t *space_order;
    uint32_t *schedule; /* rows by batch, each batch in space order */
    uint32_t *batch_ends;
    uint32_t batch_count;
    uint32_t batch_rows_max;
    uint32_t *offsets; /* per row: counts of a batch's edges to it, then the end of its slots */
    uint32_t *sources; /* slots of one batch */
    struct build_scratch *scratch;
    uint32_t workers;
    uint32_t batch_begin; /* of the batch in work, into schedule */
};

static uint32_t slack_degree(uint32_t max_degree)
{
    return (max_degree * 13 + 9) / 10;
}

static uint32_t batch_rows_max(uint64_t count)
{
    uint64_t rows = count / 50;

    rows = rows > BATCH_ROWS_LOWEST ? rows : BATCH_ROWS_LOWEST;
    rows = rows < BATCH_ROWS_HIGHEST ? rows : BATCH_ROWS_HIGHEST;
    return (uint32_t)(rows < count ? rows : count);
}

/* Room for what a search went through, and for a full list with several hundred choosers. */
static uint32_t prune_pool_limit(const struct vamana_params *params)
{
    uint32_t search = 2 * params->build_list + 256;
    uint32_t update = slack_degree(params->max_degree) + 1024;

    return search > update ? search : update;
}

uint64_t vamana_memory_bytes(uint64_t count, const struct vamana_params *params, uint32_t workers)
{
    uint32_t slack = slack_degree(params->max_degree);
    uint64_t bytes = sizeof(struct graph);

    bytes += count * slack * sizeof(uint32_t) + 2 * HUGE_PAGE_BYTES; /* neighbours, alignment */
    bytes += count * 4 * sizeof(uint32_t); /* degrees, space order, schedule, offsets */
    bytes += (uint64_t)batch_rows_max(count) * params->max_degree * sizeof(uint32_t);
    bytes += BATCHES_HIGHEST * sizeof(uint32_t);
    bytes += workers * (sizeof(struct build_scratch) +
                        search_scratch_memory_bytes(params->build_list, slack) +
                        prune_scratch_memory_bytes(prune_pool_limit(params), slack));
    return bytes;
}

/* ---- entry point ---- */

struct centre {
    const struct row_space *space;
    uint32_t block_rows;
    double *sums;      /* MEAN_BLOCKS x dim */
    float *mean;       /* dim */
    float *buffers;    /* workers x dim */
    float *distances;  /* MEAN_BLOCKS: the best of each block */
    uint32_t *nearest; /* MEAN_BLOCKS */
};

static uint32_t block_end(const struct centre *centre, uint64_t block)
{
    uint64_t end = (block + 1) * centre->block_rows;

    return end < centre->space->count ? (uint32_t)end : centre->space->count;
}

static void sum_block(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct centre *centre = context;
    uint32_t dim = centre->space->dim;

    for (uint64_t block = begin; block < end; block++) {
        double *sum = centre->sums + block * dim;

        for (uint64_t row = block * centre->block_rows; row < block_end(centre, block); row++) {
            const float *x = row_space_floats(centre->space, (uint32_t)row,
                                              centre->buffers + (uint64_t)worker * dim);

            for (uint32_t i = 0; i < dim; i++)
                sum[i] += x[i];
        }
    }
}

static void nearest_of_block(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct centre *centre = context;

    (void)worker;
    for (uint64_t block = begin; block < end; block++) {
        uint64_t row = block * centre->block_rows;

        centre->distances[block] = INFINITY;
        centre->nearest[block] = 0;
        for (; row < block_end(centre, block); row++) {
            float d = row_space_float_distance(centre->space, centre->mean,
                                               row_space_row(centre->space, (uint32_t)row));

            if (d < centre->distances[block]) {
                centre->distances[block] = d;
                centre->nearest[block] = (uint32_t)row;
            }
        }
    }
}

static int find_entry_point(const struct row_space *space, struct pool *pool, uint32_t workers,
                            uint32_t *entry_point, struct error *err)
{
    float distances[MEAN_BLOCKS];
    uint32_t nearest[MEAN_BLOCKS];
    struct centre centre = {.space = space, .distances = distances, .nearest = nearest};
    float best = INFINITY;
    int rc = -1;

    centre.block_rows = space->count / MEAN_BLOCKS + 1;
    centre.sums = calloc((size_t)MEAN_BLOCKS * space->dim, sizeof *centre.sums);
    centre.mean = malloc((size_t)space->dim * sizeof *centre.mean);
    centre.buffers = malloc((size_t)workers * space->dim * sizeof *centre.buffers);
    if (!centre.sums || !centre.mean || !centre.buffers) {
        error_set(err, ERR_NOMEM, "graph build: no memory for a mean of %u dimensions", space->dim);
        goto done;
    }
    pool_for(pool, MEAN_BLOCKS, 1, sum_block, &centre);
    for (uint32_t i = 0; i < space->dim; i++) {
        double sum = 0;

        for (uint32_t block = 0; block < MEAN_BLOCKS; block++)
            sum += centre.sums[(uint64_t)block * space->dim + i];
        centre.mean[i] = (float)(sum / space->count);
    }
    pool_for(pool, MEAN_BLOCKS, 1, nearest_of_block, &centre);
    *entry_point = 0;
    for (uint32_t block = 0; block < MEAN_BLOCKS; block++) {
        if (distances[block] < best) {
            best = distances[block];
            *entry_point = nearest[block];
        }
    }
    rc = 0;
done:
    free(centre.sums);
    free(centre.mean);
    free(centre.buffers);
    return rc;
}

/* ---- schedule ---- */

static uint32_t batch_of(const struct build *build, uint32_t position)
{
    uint32_t low = 0;
    uint32_t high = build->batch_count - 1;

    while (low < high) {
        uint32_t middle = (low + high) / 2;

        if (position < build->batch_ends[middle])
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

/* Batch 0 is the entry point alone. */
static int make_schedule(struct build *build, uint32_t entry_point, struct error *err)
{
    uint32_t count = build->space.count;
    uint32_t *positions = malloc((size_t)count * sizeof *positions); /* of each row */
    uint32_t *cursors = malloc(BATCHES_HIGHEST * sizeof *cursors);
    struct random random;
    uint32_t inserted = 0;
    int rc = -1;

    build->space_order = malloc((size_t)count * sizeof *build->space_order);
    build->schedule = malloc((size_t)count * sizeof *build->schedule);
    build->batch_ends = malloc(BATCHES_HIGHEST * sizeof *build->batch_ends);
    if (!positions || !cursors || !build->space_order || !build->schedule || !build->batch_ends) {
        error_set(err, ERR_NOMEM, "graph build: no memory to order %u rows", count);
        goto done;
    }
    const struct page_layout_params layout = {.capacity = LOCALITY_ROWS,
                                              .seed = build->params->seed};

    if (page_layout_order(build->vectors, &layout, build->pool, build->job, build->space_order,
                          err) < 0)
        goto done;

    while (inserted < count) {
        uint32_t rows = inserted == 0 ? 1 : inserted;

        rows = rows < build->batch_rows_max ? rows : build->batch_rows_max;
        rows = rows < count - inserted ? rows : count - inserted;
        assert(build->batch_count < BATCHES_HIGHEST);
        cursors[build->batch_count] = inserted;
        inserted += rows;
        build->batch_ends[build->batch_count++] = inserted;
    }

    random_init(&random, build->params->seed, STREAM_ORDER);
    random_permutation(&random, positions, count);
    for (uint32_t row = 0; row < count; row++) {
        if (positions[row] == 0) {
            positions[row] = positions[entry_point];
            positions[entry_point] = 0;
            break;
        }
    }
    for (uint32_t i = 0; i < count; i++) {
        uint32_t row = build->space_order[i];

        build->schedule[cursors[batch_of(build, positions[row])]++] = row;
    }
    rc = 0;
done:
    free(positions);
    free(cursors);
    return rc;
}

/* ---- one batch ---- */

static uint32_t *neighbours_of(const struct graph *graph, uint32_t row)
{
    return graph->neighbours + (uint64_t)row * graph->max_degree;
}

static void insert_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct build *build = context;
    struct build_scratch *scratch = &build->scratch[worker];
    struct prune_params prune = {.max_degree = build->params->max_degree,
                                 .alpha = build->params->alpha};

    if (job_cancelled(build->job))
        return;
    for (uint64_t i = begin; i < end; i++) {
        uint32_t row = build->schedule[build->batch_begin + i];
        uint32_t *kept = neighbours_of(build->graph, row);
        uint32_t count;

        vamana_search_run(&build->space, build->graph, row_space_row(&build->space, row),
                          build->params->build_list, &scratch->search);
        count = scratch->search.expanded_count;
        memcpy(scratch->prune.pool, scratch->search.expanded, count * sizeof(struct candidate));
        count = vamana_prune_run(&build->space, &prune, &scratch->prune, count, kept);
        build->graph->degrees[row] = count;
        for (uint32_t j = 0; j < count; j++)
            __atomic_fetch_add(&build->offsets[kept[j]], 1, __ATOMIC_RELAXED);
    }
    job_advance(build->job, end - begin, NULL);
}

static void scatter_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct build *build = context;

    (void)worker;
    for (uint64_t i = begin; i < end; i++) {
        uint32_t row = build->schedule[build->batch_begin + i];
        const uint32_t *kept = neighbours_of(build->graph, row);

        for (uint32_t j = 0; j < build->graph->degrees[row]; j++) {
            uint32_t slot = __atomic_fetch_add(&build->offsets[kept[j]], 1, __ATOMIC_RELAXED);

            build->sources[slot] = row;
        }
    }
}

static int compare_ids(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a;
    uint32_t y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static void sort_ids(uint32_t *ids, uint32_t count)
{
    if (count > 32) {
        qsort(ids, count, sizeof *ids, compare_ids);
        return;
    }
    for (uint32_t i = 1; i < count; i++) {
        uint32_t id = ids[i];
        uint32_t at = i;

        for (; at > 0 && ids[at - 1] > id; at--)
            ids[at] = ids[at - 1];
        ids[at] = id;
    }
}

/* Puts the row's own list and `count` more ids into the prune's pool. Returns the pool's size. */
static uint32_t fill_pool(const struct build *build, struct prune_scratch *prune, uint32_t row,
                          const uint32_t *more, uint32_t count)
{
    const struct row_space *space = &build->space;
    const uint32_t *neighbours = neighbours_of(build->graph, row);
    const uint8_t *vector = row_space_row(space, row);
    uint32_t degree = build->graph->degrees[row];
    uint32_t total = degree + count;

    for (uint32_t i = 0; i < total; i++) {
        prune->pool[i].id = i < degree ? neighbours[i] : more[i - degree];
        row_space_prefetch(space, prune->pool[i].id);
    }
    for (uint32_t i = 0; i < total; i++)
        prune->pool[i].distance =
            row_space_distance(space, vector, row_space_row(space, prune->pool[i].id));
    return total;
}

static void take_choosers(struct build *build, struct prune_scratch *prune, uint32_t row,
                          uint32_t *choosers, uint32_t count)
{
    struct prune_params params = {.max_degree = build->params->max_degree,
                                  .alpha = build->params->alpha};
    struct graph *graph = build->graph;
    uint32_t *neighbours = neighbours_of(graph, row);

    sort_ids(choosers, count);
    while (count > 0) {
        uint32_t degree = graph->degrees[row];
        uint32_t taken = count;

        if (degree + count <= graph->max_degree) {
            memcpy(neighbours + degree, choosers, count * sizeof *choosers);
            graph->degrees[row] = degree + count;
            return;
        }
        if (taken > prune->pool_limit - degree)
            taken = prune->pool_limit - degree;
        graph->degrees[row] =
            vamana_prune_run(&build->space, &params, prune,
                             fill_pool(build, prune, row, choosers, taken), neighbours);
        choosers += taken;
        count -= taken;
    }
}

static void update_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct build *build = context;

    if (job_cancelled(build->job))
        return;
    for (uint64_t i = begin; i < end; i++) {
        uint32_t row = build->space_order[i];
        uint32_t from = row == 0 ? 0 : build->offsets[row - 1];
        uint32_t to = build->offsets[row];

        if (from < to)
            take_choosers(build, &build->scratch[worker].prune, row, build->sources + from,
                          to - from);
    }
}

static int insert_batch(struct build *build, uint32_t begin, uint32_t end, struct error *err)
{
    uint32_t count = build->space.count;
    uint32_t sum = 0;

    build->batch_begin = begin;
    memset(build->offsets, 0, (size_t)count * sizeof *build->offsets);
    pool_for(build->pool, end - begin, INSERT_GRAIN, insert_rows, build);
    if (job_advance(build->job, 0, err) < 0)
        return -1;
    for (uint32_t row = 0; row < count; row++) {
        uint32_t edges = build->offsets[row];

        build->offsets[row] = sum;
        sum += edges;
    }
    pool_for(build->pool, end - begin, INSERT_GRAIN, scatter_rows, build);
    pool_for(build->pool, count, UPDATE_GRAIN, update_rows, build);
    return job_advance(build->job, 0, err);
}

/* ---- the end ---- */

/* Cuts every list to max_degree and orders it. What the prune would drop stays, behind the rest,
 * where there is room: the walk has use for it and the list's reader may cut it off. */
static void finish_rows(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct build *build = context;
    struct prune_scratch *prune = &build->scratch[worker].prune;
    struct prune_params params = {
        .max_degree = build->params->max_degree, .alpha = build->params->alpha, .saturate = true};

    if (job_cancelled(build->job))
        return;
    for (uint64_t i = begin; i < end; i++) {
        uint32_t row = build->space_order[i];

        build->graph->degrees[row] =
            vamana_prune_run(&build->space, &params, prune, fill_pool(build, prune, row, NULL, 0),
                             neighbours_of(build->graph, row));
    }
    job_advance(build->job, end - begin, NULL);
}

/* From slack stride to max_degree stride, in place. */
static void tighten(struct graph *graph, uint32_t max_degree)
{
    uint32_t *smaller;

    for (uint64_t row = 0; row < graph->count; row++) {
        uint32_t *to = graph->neighbours + row * max_degree;
        uint32_t degree = graph->degrees[row];

        memmove(to, graph->neighbours + row * graph->max_degree, degree * sizeof *to);
        memset(to + degree, 0, (max_degree - degree) * sizeof *to);
    }
    graph->max_degree = max_degree;
    smaller =
        realloc(graph->neighbours, (size_t)graph->count * max_degree * sizeof *graph->neighbours);
    if (smaller)
        graph->neighbours = smaller;
}

/* Big arrays that are read at random stand on huge pages: half the misses are the TLB's. */
static void *alloc_big(uint64_t bytes)
{
    void *memory = NULL;

    if (bytes < 8 * HUGE_PAGE_BYTES)
        return malloc(bytes);
    if (posix_memalign(&memory, HUGE_PAGE_BYTES, bytes) != 0)
        return NULL;
    madvise(memory, bytes, MADV_HUGEPAGE); /* advice: nothing depends on it */
    return memory;
}

static struct graph *graph_new(uint32_t count, uint32_t max_degree, struct error *err)
{
    struct graph *graph = calloc(1, sizeof *graph);

    if (!graph)
        goto nomem;
    graph->count = count;
    graph->max_degree = max_degree;
    graph->degrees = calloc(count, sizeof *graph->degrees);
    graph->neighbours = alloc_big((uint64_t)count * max_degree * sizeof *graph->neighbours);
    if (graph->degrees && graph->neighbours)
        return graph;
nomem:
    graph_free(graph);
    error_set(err, ERR_NOMEM, "graph build: no memory for %u lists of %u", count, max_degree);
    return NULL;
}

static int check_params(const struct vamana_params *params, struct error *err)
{
    if (params->max_degree < MAX_DEGREE_LOWEST || params->max_degree > MAX_DEGREE_HIGHEST)
        return error_set(err, ERR_INVALID, "graph build: max_degree is %u, not %u..%u",
                         params->max_degree, MAX_DEGREE_LOWEST, MAX_DEGREE_HIGHEST);
    if (params->build_list < params->max_degree / 2 || params->build_list > BUILD_LIST_HIGHEST)
        return error_set(err, ERR_INVALID, "graph build: build_list is %u, not %u..%u",
                         params->build_list, params->max_degree / 2, BUILD_LIST_HIGHEST);
    if (!(params->alpha >= 1 && params->alpha <= 10))
        return error_set(err, ERR_INVALID, "graph build: alpha is %g, not 1..10",
                         (double)params->alpha);
    return 0;
}

static int prepare(struct build *build, struct error *err)
{
    uint32_t count = build->space.count;
    uint32_t slack = slack_degree(build->params->max_degree);
    uint32_t entry_point;

    build->workers = build->pool ? pool_workers(build->pool) : 1;
    build->batch_rows_max = batch_rows_max(count);
    if (find_entry_point(&build->space, build->pool, build->workers, &entry_point, err) < 0)
        return -1;
    if (make_schedule(build, entry_point, err) < 0)
        return -1;
    build->graph = graph_new(count, slack, err);
    if (!build->graph)
        return -1;
    build->graph->entry_point = entry_point;
    build->offsets = malloc((size_t)count * sizeof *build->offsets);
    build->sources =
        malloc((size_t)build->batch_rows_max * build->params->max_degree * sizeof *build->sources);
    build->scratch = calloc(build->workers, sizeof *build->scratch);
    if (!build->offsets || !build->sources || !build->scratch)
        return error_set(err, ERR_NOMEM, "graph build: no memory for batches of %u rows",
                         build->batch_rows_max);
    for (uint32_t i = 0; i < build->workers; i++) {
        if (search_scratch_init(&build->scratch[i].search, build->params->build_list, slack, err) <
            0)
            return -1;
        if (prune_scratch_init(&build->scratch[i].prune, prune_pool_limit(build->params), slack,
                               err) < 0)
            return -1;
    }
    return 0;
}

int vamana_build(const struct vector_matrix *vectors, const struct vamana_params *params,
                 struct pool *pool, struct job *job, struct graph **out, struct error *err)
{
    struct build build = {.vectors = vectors, .params = params, .pool = pool, .job = job};
    uint64_t linked;
    int rc = -1;

    if (row_space_init(&build.space, vectors, err) < 0 || check_params(params, err) < 0)
        goto done;
    if (prepare(&build, err) < 0)
        goto done;
    job_phase(job, "graph insert", vectors->count);
    for (uint32_t batch = 1; batch < build.batch_count; batch++) {
        if (insert_batch(&build, build.batch_ends[batch - 1], build.batch_ends[batch], err) < 0)
            goto done;
    }
    job_phase(job, "graph finish", vectors->count);
    pool_for(pool, vectors->count, UPDATE_GRAIN, finish_rows, &build);
    if (job_advance(job, 0, err) < 0)
        goto done;
    tighten(build.graph, params->max_degree);
    if (graph_connect(vectors, build.graph, &linked, err) < 0)
        goto done;
    *out = build.graph;
    build.graph = NULL;
    rc = 0;
done:
    for (uint32_t i = 0; build.scratch && i < build.workers; i++) {
        search_scratch_release(&build.scratch[i].search);
        prune_scratch_release(&build.scratch[i].prune);
    }
    free(build.scratch);
    free(build.sources);
    free(build.offsets);
    free(build.batch_ends);
    free(build.schedule);
    free(build.space_order);
    graph_free(build.graph);
    return rc;
}
