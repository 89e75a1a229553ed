/* How it works. Draft: a task is TASK_ROWS places. leaf_finder names the leaves each of them looks
 * into; pairs (leaf, row) sorted by leaf give for every leaf the rows of the task to compare with
 * it, which block_distances does in one call. Pools are emptied into lists (their head), pruned,
 * and the kept edges go to the draft and, turned around, to the runs. Batches of tasks run in
 * parallel into one buffer, which the calling thread writes in order.
 *
 * Finish: a range of edge_runs is read back twice, to count and to place; then every row is pruned
 * once more over its own and its incoming edges. Rows that more edges come into than REVERSE_MAX
 * take evenly spread ones of them.
 *
 * Pruning compares candidates with each other, wherever they stand. With held rows it looks there;
 * else the rows of a few at a time (as many as GATHER_BYTES hold) are gathered from the file, leaf
 * by leaf, into a space of their own. */
#include "index/leaf_graph.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "index/block_products.h"
#include "index/edge_runs.h"
#include "index/graph_store.h"
#include "index/vamana_prune.h"
#include "index/vamana_search.h"
#include "storage/base/random.h"
#include "storage/file.h"

/* Tests make these small, to see all of the ways there are with few rows. */
#ifndef BATCH_TASKS
#define BATCH_TASKS 32u /* at most: results of one are in memory at once */
#define GATHER_BYTES (16u << 20)
/* Rows of a leaf compared at all, TASK_ROWS at least. Leaves hold 128 rows on average; one that
 * holds many more holds copies of a few vectors, and to compare all with all would take forever. */
#define LEAF_ROWS_MAX 8192u
#endif

#define TASK_ROWS 1024u
#define LEAF_CHUNK 256u /* rows of a leaf compared at once */
#define FAR_ROWS 16u
#define REVERSE_MAX 512u
#define FINISH_ROWS 128u /* a task of the second half */
#define PROBES_DEFAULT 64u
#define STREAM_FAR 0x6661720000000000ull

struct worker {
    struct leaf_finder_scratch *finder;
    uint32_t *leaves;         /* TASK_ROWS x probes */
    uint64_t *pairs;          /* TASK_ROWS x probes: leaf, row of the task */
    uint8_t *rows;            /* TASK_ROWS space rows, when none are held */
    uint8_t *leaf_rows;       /* LEAF_CHUNK space rows, likewise */
    float *norms;             /* TASK_ROWS */
    float *leaf_norms;        /* LEAF_CHUNK */
    float *distances;         /* TASK_ROWS x LEAF_CHUNK */
    uint32_t *picks;          /* TASK_ROWS */
    struct block_pool *pools; /* TASK_ROWS */
    float *pool_distances;
    uint32_t *pool_ids;
    struct prune_scratch prune;
    uint8_t *gathered;    /* GATHER_BYTES or what one row needs, when no rows are held */
    uint32_t *gather_ids; /* the places in it, ascending */
    uint64_t gather_room; /* places */
    uint32_t *kept;
    struct error error;
};

struct making {
    struct vfs *vfs;
    const struct row_store *store;
    struct leaf_graph_params params;
    struct journal *journal;
    struct pool *pool;
    struct job *job;
    struct leaf_finder *finder;
    struct row_space held;  /* valid when the store's rows are held */
    float *group_centroids; /* group_count x space_dim, for far rows */
    struct worker *workers;
    uint32_t worker_count;
    uint32_t prune_limit;
    bool failed;

    /* one batch */
    uint32_t first;   /* place */
    uint32_t *lists;  /* a record a row (graph_store.h) of LEAF_GRAPH_LIST_PLACES */
    uint32_t *drafts; /* and of max_degree */

    /* one range */
    uint64_t *offsets; /* EDGE_RUNS_RANGE + 1 */
    uint32_t *counts;  /* of incoming edges met so far */
    uint32_t *totals;
    uint32_t *sources;
    uint32_t range_first;
};

/* Other workers stop at their next task. */
static void give_up(struct making *m)
{
    __atomic_store_n(&m->failed, true, __ATOMIC_RELAXED);
}

static int first_error(struct making *m, struct error *err)
{
    for (uint32_t i = 0; i < m->worker_count; i++)
        if (m->workers[i].error.code != ERR_NONE) {
            *err = m->workers[i].error;
            return -1;
        }
    return 0;
}

/* ---- rows, held or read ---- */

static const uint8_t *rows_at(const struct making *m, uint32_t first, uint32_t count,
                              uint8_t *buffer, struct error *err)
{
    const struct row_store *store = m->store;

    if (store->resident)
        return store->resident + (uint64_t)first * store->shape.stride;
    return row_store_read(store, first, count, buffer, err) < 0 ? NULL : buffer;
}

static int compare_u32(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

    return (x > y) - (x < y);
}

static int compare_u64(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return (x > y) - (x < y);
}

static uint32_t leaf_of(const struct row_store *store, uint32_t place)
{
    uint32_t low = 0, high = store->leaf_count;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (store->leaf_begins[middle] <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Where a gathered place stands. */
static uint32_t local_of(const struct worker *w, uint32_t count, uint32_t place)
{
    uint32_t low = 0, high = count;

    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;

        if (w->gather_ids[middle] <= place)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Sorts gather_ids[0..count), drops copies, and brings their rows: how many there are, or 0. */
static uint32_t gather(const struct making *m, struct worker *w, uint64_t count)
{
    const struct row_store *store = m->store;
    uint64_t stride = store->shape.stride;
    uint32_t kept = 0;

    qsort(w->gather_ids, count, sizeof *w->gather_ids, compare_u32);
    for (uint64_t i = 0; i < count; i++)
        if (kept == 0 || w->gather_ids[kept - 1] != w->gather_ids[i])
            w->gather_ids[kept++] = w->gather_ids[i];
    for (uint32_t i = 0; i < kept;) {
        uint32_t leaf = leaf_of(store, w->gather_ids[i]);
        uint32_t begin = w->gather_ids[i], end = store->leaf_begins[leaf + 1];

        end = end - begin > LEAF_CHUNK ? begin + LEAF_CHUNK : end;
        if (row_store_read(store, begin, end - begin, w->leaf_rows, &w->error) < 0)
            return 0;
        for (; i < kept && w->gather_ids[i] < end; i++)
            memcpy(w->gathered + i * stride, w->leaf_rows + (w->gather_ids[i] - begin) * stride,
                   stride);
    }
    return kept;
}

/* Prunes the candidates of prune.pool (ids are places) for `place` into kept[]: how many. */
static uint32_t prune_held(const struct making *m, struct worker *w, uint32_t count, bool saturate,
                           uint32_t *kept)
{
    const struct prune_params params = {m->params.max_degree, m->params.alpha, saturate};

    return vamana_prune_run(&m->held, &params, &w->prune, count, kept);
}

/* The same over gathered rows: ids are turned into places of the gathered space and back. */
static uint32_t prune_gathered(const struct making *m, struct worker *w,
                               const struct row_space *space, uint32_t gathered, uint32_t count,
                               bool saturate, uint32_t *kept)
{
    const struct prune_params params = {m->params.max_degree, m->params.alpha, saturate};
    uint32_t degree;

    for (uint32_t i = 0; i < count; i++)
        w->prune.pool[i].id = local_of(w, gathered, w->prune.pool[i].id);
    degree = vamana_prune_run(space, &params, &w->prune, count, kept);
    for (uint32_t i = 0; i < degree; i++)
        kept[i] = w->gather_ids[kept[i]];
    return degree;
}

static int gathered_space(const struct making *m, struct worker *w, uint32_t count,
                          struct row_space *space)
{
    const struct vector_matrix matrix = {w->gathered, m->store->shape.stride, count,
                                         m->store->shape.space_dim, m->store->shape.space_type};

    return row_space_init(space, &matrix, &w->error);
}

/* ---- draft ---- */

/* Rows farther and farther from the task: one of a random leaf of each of FAR_ROWS groups whose
 * ranks grow by a constant factor. */
static uint32_t far_rows(const struct making *m, uint32_t first, uint32_t *far)
{
    const struct row_store *store = m->store;
    uint32_t dim = store->shape.space_dim;
    uint32_t own = leaf_of(store, first) / ROW_STORE_GROUP;
    const float *centre = m->group_centroids + (uint64_t)own * dim;
    uint64_t *ranked = malloc(store->group_count * sizeof *ranked);
    struct random random;
    uint32_t count = 0;

    if (!ranked)
        return UINT32_MAX;
    for (uint32_t g = 0; g < store->group_count; g++) {
        float d =
            distance_kernels_best()->l2_f32(centre, m->group_centroids + (uint64_t)g * dim, dim);
        uint32_t bits;

        memcpy(&bits, &d, sizeof bits);
        ranked[g] = (uint64_t)bits << 32 | g;
    }
    qsort(ranked, store->group_count, sizeof *ranked, compare_u64);
    random_init(&random, m->params.seed, STREAM_FAR + first);
    for (uint32_t i = 0; i < FAR_ROWS; i++) {
        uint32_t rank = (uint32_t)((uint64_t)store->group_count * (i + 1) * (i + 1) /
                                   ((FAR_ROWS + 1) * (FAR_ROWS + 1)));
        uint32_t leaf_begin = (uint32_t)ranked[rank] * ROW_STORE_GROUP;
        uint32_t leaf_end = leaf_begin + ROW_STORE_GROUP < store->leaf_count
                                ? leaf_begin + ROW_STORE_GROUP
                                : store->leaf_count;
        uint32_t begin = store->leaf_begins[leaf_begin], end = store->leaf_begins[leaf_end];

        if (begin < end)
            far[count++] = begin + (uint32_t)random_below(&random, end - begin);
    }
    free(ranked);
    return count;
}

/* Which rows of a leaf the task that begins at `first` is compared with: all, or in a leaf beyond
 * LEAF_ROWS_MAX a stretch around the task itself, else anywhere. */
static void leaf_stretch(const struct making *m, uint32_t leaf, uint32_t first, uint32_t *begin,
                         uint32_t *end)
{
    uint32_t leaf_begin = m->store->leaf_begins[leaf], leaf_end = m->store->leaf_begins[leaf + 1];
    uint32_t spare, skipped;

    *begin = leaf_begin;
    *end = leaf_end;
    if (leaf_end - leaf_begin <= LEAF_ROWS_MAX)
        return;
    spare = leaf_end - leaf_begin - LEAF_ROWS_MAX;
    if (first >= leaf_begin && first < leaf_end) {
        uint32_t before = (LEAF_ROWS_MAX - TASK_ROWS) / 2;

        skipped = first - leaf_begin > before ? first - leaf_begin - before : 0;
        skipped = skipped < spare ? skipped : spare;
    } else if (first < leaf_begin && leaf_begin - first < TASK_ROWS) {
        skipped = 0; /* the task's last rows are the leaf's first */
    } else {
        skipped = (uint32_t)((uint64_t)(first / TASK_ROWS * 2654435761u) * spare >> 32);
    }
    *begin = leaf_begin + skipped;
    *end = *begin + LEAF_ROWS_MAX;
}

/* Fills the pools of the task's rows. */
static int fill_pools(const struct making *m, struct worker *w, uint32_t first, uint32_t rows)
{
    const struct row_store *store = m->store;
    const struct row_shape *shape = &store->shape;
    uint32_t probes = m->params.probes;
    const uint8_t *a = rows_at(m, first, rows, w->rows, &w->error);
    uint64_t pairs = 0;

    if (!a)
        return -1;
    block_norms(shape->space_type, a, rows, shape->space_dim, w->norms);
    leaf_finder_find(m->finder, w->finder, a, rows, probes, w->leaves);
    for (uint32_t i = 0; i < rows; i++) {
        block_pool_init(&w->pools[i], w->pool_distances + (uint64_t)i * 2 * m->params.pool,
                        w->pool_ids + (uint64_t)i * 2 * m->params.pool, m->params.pool);
        for (uint32_t p = 0; p < probes; p++)
            if (w->leaves[i * probes + p] != UINT32_MAX)
                w->pairs[pairs++] = (uint64_t)w->leaves[i * probes + p] << 32 | i;
    }
    qsort(w->pairs, pairs, sizeof *w->pairs, compare_u64);
    for (uint64_t i = 0; i < pairs;) {
        uint32_t leaf = (uint32_t)(w->pairs[i] >> 32), count = 0, begin, end;

        leaf_stretch(m, leaf, first, &begin, &end);
        for (; i < pairs && w->pairs[i] >> 32 == leaf; i++)
            w->picks[count++] = (uint32_t)w->pairs[i];
        for (; begin < end; begin += LEAF_CHUNK) {
            uint32_t n = end - begin < LEAF_CHUNK ? end - begin : LEAF_CHUNK;
            const uint8_t *b = rows_at(m, begin, n, w->leaf_rows, &w->error);

            if (!b)
                return -1;
            block_norms(shape->space_type, b, n, shape->space_dim, w->leaf_norms);
            block_distances(shape->space_type, a, w->picks, count, w->norms, b, n, w->leaf_norms,
                            shape->space_dim, w->distances, LEAF_CHUNK);
            for (uint32_t j = 0; j < count; j++)
                block_pool_offer(&w->pools[w->picks[j]], w->distances + (uint64_t)j * LEAF_CHUNK, n,
                                 begin, first + w->picks[j]);
        }
    }
    for (uint32_t i = 0; i < rows; i++)
        block_pool_finish(&w->pools[i]);
    return 0;
}

/* The candidates of a row: its pool, and the far rows that are not in it. far_distances: of them
 * to the row. */
static uint32_t fill_candidates(const struct making *m, struct worker *w, uint32_t i,
                                uint32_t place, const uint32_t *far, uint32_t far_count,
                                const float *far_distances)
{
    const struct block_pool *pool = &w->pools[i];
    uint32_t count = 0;

    (void)m;
    for (; count < pool->count; count++)
        w->prune.pool[count] =
            (struct candidate){.distance = pool->distances[count], .id = pool->ids[count]};
    for (uint32_t f = 0; f < far_count; f++) {
        bool known = far[f] == place;

        /* Nearer than the pool's last, it was either in a leaf looked into, or it may join. */
        for (uint32_t p = 0; p < pool->count && !known; p++)
            known = pool->ids[p] == far[f];
        for (uint32_t g = 0; g < f && !known; g++)
            known = far[g] == far[f];
        if (!known)
            w->prune.pool[count++] = (struct candidate){.distance = far_distances[f], .id = far[f]};
    }
    return count;
}

static void put_draft(struct making *m, uint32_t row, uint32_t degree, const uint32_t *kept)
{
    uint32_t words = graph_record_words(m->params.max_degree);
    uint32_t *record = m->drafts + (uint64_t)row * words;

    memset(record, 0, words * sizeof *record);
    record[0] = degree;
    memcpy(record + 1, kept, degree * sizeof *kept);
}

static void put_list(struct making *m, uint32_t row, const struct block_pool *pool)
{
    uint32_t words = graph_record_words(LEAF_GRAPH_LIST_PLACES);
    uint32_t *list = m->lists + (uint64_t)row * words;

    memset(list, 0, words * sizeof *list);
    list[0] = pool->count < LEAF_GRAPH_LIST_PLACES ? pool->count : LEAF_GRAPH_LIST_PLACES;
    memcpy(list + 1, pool->ids, list[0] * sizeof *list);
}

static int draft_held(struct making *m, struct worker *w, uint32_t first, uint32_t rows,
                      const uint32_t *far, uint32_t far_count)
{
    float distances[FAR_ROWS];

    for (uint32_t i = 0; i < rows; i++) {
        uint32_t place = first + i, count;

        for (uint32_t f = 0; f < far_count; f++)
            distances[f] = row_space_distance(&m->held, row_space_row(&m->held, place),
                                              row_space_row(&m->held, far[f]));
        count = fill_candidates(m, w, i, place, far, far_count, distances);
        for (uint32_t c = 0; c < count; c++)
            row_space_prefetch(&m->held, w->prune.pool[c].id);
        put_draft(m, place - m->first, prune_held(m, w, count, false, w->kept), w->kept);
        put_list(m, place - m->first, &w->pools[i]);
    }
    return 0;
}

static int draft_gathered(struct making *m, struct worker *w, uint32_t first, uint32_t rows,
                          const uint32_t *far, uint32_t far_count)
{
    uint64_t room = w->gather_room;
    uint32_t done = 0;

    while (done < rows) {
        struct row_space space;
        uint64_t wanted = 0;
        uint32_t until = done, gathered;

        for (uint32_t f = 0; f < far_count; f++)
            w->gather_ids[wanted++] = far[f];
        for (; until < rows; until++) {
            const struct block_pool *pool = &w->pools[until];

            if (wanted + pool->count + 1 > room)
                break;
            w->gather_ids[wanted++] = first + until;
            for (uint32_t c = 0; c < pool->count; c++)
                w->gather_ids[wanted++] = pool->ids[c];
        }
        gathered = gather(m, w, wanted);
        if (gathered == 0 || gathered_space(m, w, gathered, &space) < 0)
            return -1;
        for (; done < until; done++) {
            const uint8_t *row = row_space_row(&space, local_of(w, gathered, first + done));
            float distances[FAR_ROWS];
            uint32_t count;

            for (uint32_t f = 0; f < far_count; f++)
                distances[f] = row_space_distance(
                    &space, row, row_space_row(&space, local_of(w, gathered, far[f])));
            count = fill_candidates(m, w, done, first + done, far, far_count, distances);
            put_draft(m, first + done - m->first,
                      prune_gathered(m, w, &space, gathered, count, false, w->kept), w->kept);
            put_list(m, first + done - m->first, &w->pools[done]);
        }
    }
    return 0;
}

static void draft_tasks(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct making *m = context;
    struct worker *w = &m->workers[worker];

    for (uint64_t task = begin; task < end; task++) {
        uint32_t first = m->first + (uint32_t)task * TASK_ROWS;
        uint32_t rows = m->store->count - first < TASK_ROWS ? m->store->count - first : TASK_ROWS;
        uint32_t far[FAR_ROWS], far_count;
        int rc;

        if (__atomic_load_n(&m->failed, __ATOMIC_RELAXED) || job_cancelled(m->job))
            return;
        far_count = far_rows(m, first, far);
        if (far_count == UINT32_MAX) {
            error_set(&w->error, ERR_NOMEM, "no memory to rank groups of leaves");
            give_up(m);
            return;
        }
        rc = fill_pools(m, w, first, rows);
        if (rc == 0)
            rc = m->store->resident ? draft_held(m, w, first, rows, far, far_count)
                                    : draft_gathered(m, w, first, rows, far, far_count);
        if (rc < 0) {
            give_up(m);
            return;
        }
        job_advance(m->job, rows, NULL);
    }
}

static uint64_t state_u64(struct journal *journal, const char *name)
{
    uint64_t value = 0;

    if (!manifest_has(journal_state(journal), name) ||
        manifest_get_u64(journal_state(journal), name, &value, NULL) < 0)
        return 0;
    return value;
}

static int draft_commit(struct making *m, struct graph_store *drafts, struct graph_store *lists,
                        struct edge_runs *runs, uint64_t rows, struct error *err)
{
    uint64_t blocks;

    if (edge_runs_flush(runs, &blocks, err) < 0 || graph_store_sync(drafts, err) < 0 ||
        graph_store_sync(lists, err) < 0 ||
        manifest_set_u64(journal_state(m->journal), "graph.drafted", rows, err) < 0 ||
        manifest_set_u64(journal_state(m->journal), "graph.edge_blocks", blocks, err) < 0)
        return -1;
    return journal_commit(m->journal, err);
}

static uint32_t batch_rows(uint64_t count)
{
    return count < BATCH_TASKS * TASK_ROWS ? (uint32_t)count : BATCH_TASKS * TASK_ROWS;
}

/* Candidates and drafts of all rows, from where the state says. */
static int make_drafts(struct making *m, struct graph_store *drafts, struct edge_runs *runs,
                       struct error *err)
{
    uint64_t done = state_u64(m->journal, "graph.drafted");
    uint32_t batch = batch_rows(m->store->count), record = graph_record_words(m->params.max_degree);
    struct graph_store *lists = NULL;
    int rc = -1;

    job_phase(m->job, "candidates", m->store->count);
    job_advance(m->job, done, NULL);
    if (graph_store_open(m->vfs, m->journal, "lists", m->store->count, LEAF_GRAPH_LIST_PLACES,
                         done == 0, &lists, err) < 0)
        goto done;
    m->lists =
        malloc((uint64_t)batch * graph_record_words(LEAF_GRAPH_LIST_PLACES) * sizeof *m->lists);
    m->drafts = malloc((uint64_t)batch * record * sizeof *m->drafts);
    if (!m->lists || !m->drafts) {
        error_set(err, ERR_NOMEM, "no memory for a batch of drafts");
        goto done;
    }
    while (done < m->store->count) {
        uint32_t rows = (uint32_t)(m->store->count - done < batch ? m->store->count - done : batch);

        m->first = (uint32_t)done;
        pool_for(m->pool, (rows + TASK_ROWS - 1) / TASK_ROWS, 1, draft_tasks, m);
        if (first_error(m, err) < 0 || job_advance(m->job, 0, err) < 0)
            goto done;
        if (graph_store_write(lists, (uint32_t)done, rows, m->lists, err) < 0 ||
            graph_store_write(drafts, (uint32_t)done, rows, m->drafts, err) < 0)
            goto done;
        for (uint32_t i = 0; i < rows; i++) {
            const uint32_t *draft = m->drafts + (uint64_t)i * record;

            for (uint32_t e = 0; e < draft[0]; e++)
                if (edge_runs_add(runs, draft[1 + e], (uint32_t)done + i, err) < 0)
                    goto done;
        }
        done += rows;
        if ((done == m->store->count || journal_commit_due(m->journal)) &&
            draft_commit(m, drafts, lists, runs, done, err) < 0)
            goto done;
    }
    rc = 0;
done:
    free(m->lists);
    free(m->drafts);
    m->lists = NULL;
    m->drafts = NULL;
    graph_store_close(lists);
    return rc;
}

/* ---- finish ---- */

static void count_edges(void *context, const struct edge *edges, uint32_t count)
{
    struct making *m = context;

    for (uint32_t i = 0; i < count; i++)
        m->totals[edges[i].to - m->range_first]++;
}

/* Of `total` incoming edges of a row the n-th is taken if the evenly spread ones hold it. */
static bool is_taken(uint32_t n, uint32_t total)
{
    return total <= REVERSE_MAX ||
           (uint64_t)n * REVERSE_MAX / total != (uint64_t)(n + 1) * REVERSE_MAX / total;
}

static void place_edges(void *context, const struct edge *edges, uint32_t count)
{
    struct making *m = context;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t at = edges[i].to - m->range_first;

        if (m->counts[at] < m->totals[at] && is_taken(m->counts[at]++, m->totals[at]))
            m->sources[m->offsets[at]++] = edges[i].from;
    }
}

/* Sorts the incoming edges of a range's rows to them: offsets[i] .. offsets[i + 1] of sources. */
static int load_range(struct making *m, const struct edge_runs *runs, uint32_t range,
                      struct error *err)
{
    uint64_t sum = 0;

    m->range_first = range * EDGE_RUNS_RANGE;
    memset(m->totals, 0, EDGE_RUNS_RANGE * sizeof *m->totals);
    memset(m->counts, 0, EDGE_RUNS_RANGE * sizeof *m->counts);
    if (edge_runs_read(runs, range, count_edges, m, err) < 0)
        return -1;
    for (uint32_t i = 0; i < EDGE_RUNS_RANGE; i++) {
        m->offsets[i] = sum;
        sum += m->totals[i] < REVERSE_MAX ? m->totals[i] : REVERSE_MAX;
    }
    free(m->sources);
    m->sources = malloc((sum + 1) * sizeof *m->sources);
    if (!m->sources)
        return error_set(err, ERR_NOMEM, "no memory for %" PRIu64 " edges", sum);
    if (edge_runs_read(runs, range, place_edges, m, err) < 0)
        return -1;
    if (memcmp(m->counts, m->totals, EDGE_RUNS_RANGE * sizeof *m->counts) != 0)
        return error_set(err, ERR_CORRUPT, "the edges of range %" PRIu32 " changed between reads",
                         range);
    /* Every offset has moved up to the next one's place. */
    memmove(m->offsets + 1, m->offsets, EDGE_RUNS_RANGE * sizeof *m->offsets);
    m->offsets[0] = 0;
    return 0;
}

/* The row's own edges and those that come in, each once: ids into prune.pool, how many. */
static uint32_t both_ways(const struct making *m, struct worker *w, uint32_t place,
                          const uint32_t *draft)
{
    uint32_t at = place - m->range_first, count = 0;

    for (; count < draft[0]; count++)
        w->prune.pool[count].id = draft[1 + count];
    for (uint64_t i = m->offsets[at]; i < m->offsets[at + 1]; i++) {
        bool known = false;

        for (uint32_t e = 0; e < draft[0] && !known; e++)
            known = draft[1 + e] == m->sources[i];
        if (!known)
            w->prune.pool[count++].id = m->sources[i];
    }
    return count;
}

static void set_distances(const struct row_space *space, struct worker *w, const uint8_t *row,
                          uint32_t count, uint32_t gathered)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t id = w->prune.pool[i].id;

        w->prune.pool[i].distance = row_space_distance(
            space, row, row_space_row(space, gathered ? local_of(w, gathered, id) : id));
        w->prune.pool[i].state = 0;
    }
}

static int finish_held(struct making *m, struct worker *w, uint32_t first, uint32_t rows)
{
    for (uint32_t i = 0; i < rows; i++) {
        uint32_t place = first + i;
        uint32_t *draft =
            m->drafts + (uint64_t)(place - m->first) * graph_record_words(m->params.max_degree);
        uint32_t count = both_ways(m, w, place, draft);

        for (uint32_t c = 0; c < count; c++)
            row_space_prefetch(&m->held, w->prune.pool[c].id);
        set_distances(&m->held, w, row_space_row(&m->held, place), count, 0);
        put_draft(m, place - m->first, prune_held(m, w, count, true, w->kept), w->kept);
    }
    return 0;
}

static int finish_gathered(struct making *m, struct worker *w, uint32_t first, uint32_t rows)
{
    uint32_t record = graph_record_words(m->params.max_degree), done = 0;

    while (done < rows) {
        struct row_space space;
        uint64_t wanted = 0;
        uint32_t until = done, gathered;

        for (; until < rows; until++) {
            uint32_t place = first + until;
            uint32_t count =
                both_ways(m, w, place, m->drafts + (uint64_t)(place - m->first) * record);

            if (wanted + count + 1 > w->gather_room)
                break;
            w->gather_ids[wanted++] = place;
            for (uint32_t c = 0; c < count; c++)
                w->gather_ids[wanted++] = w->prune.pool[c].id;
        }
        gathered = gather(m, w, wanted);
        if (gathered == 0 || gathered_space(m, w, gathered, &space) < 0)
            return -1;
        for (; done < until; done++) {
            uint32_t place = first + done;
            uint32_t count =
                both_ways(m, w, place, m->drafts + (uint64_t)(place - m->first) * record);

            set_distances(&space, w, row_space_row(&space, local_of(w, gathered, place)), count,
                          gathered);
            put_draft(m, place - m->first,
                      prune_gathered(m, w, &space, gathered, count, true, w->kept), w->kept);
        }
    }
    return 0;
}

static void finish_tasks(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct making *m = context;
    struct worker *w = &m->workers[worker];
    uint32_t first = m->first + (uint32_t)begin, rows = (uint32_t)(end - begin);
    int rc;

    if (__atomic_load_n(&m->failed, __ATOMIC_RELAXED) || job_cancelled(m->job))
        return;
    rc = m->store->resident ? finish_held(m, w, first, rows) : finish_gathered(m, w, first, rows);
    if (rc < 0)
        give_up(m);
    job_advance(m->job, rows, NULL);
}

static int make_final(struct making *m, const struct graph_store *drafts,
                      const struct edge_runs *runs, struct error *err)
{
    uint64_t done = state_u64(m->journal, "graph.finished");
    uint32_t batch = batch_rows(m->store->count), record = graph_record_words(m->params.max_degree);
    struct graph_store *graph = NULL;
    int rc = -1;

    job_phase(m->job, "edges", m->store->count);
    job_advance(m->job, done, NULL);
    m->offsets = malloc((EDGE_RUNS_RANGE + 1) * sizeof *m->offsets);
    m->counts = malloc(EDGE_RUNS_RANGE * sizeof *m->counts);
    m->totals = malloc(EDGE_RUNS_RANGE * sizeof *m->totals);
    m->drafts = malloc((uint64_t)batch * record * sizeof *m->drafts);
    if (!m->offsets || !m->counts || !m->totals || !m->drafts) {
        error_set(err, ERR_NOMEM, "no memory for a range of edges");
        goto done;
    }
    if (graph_store_open(m->vfs, m->journal, "graph", m->store->count, m->params.max_degree,
                         done == 0, &graph, err) < 0)
        goto done;
    while (done < m->store->count) {
        uint32_t range = (uint32_t)(done / EDGE_RUNS_RANGE);
        uint64_t end = (uint64_t)(range + 1) * EDGE_RUNS_RANGE;

        end = end < m->store->count ? end : m->store->count;
        if (load_range(m, runs, range, err) < 0)
            goto done;
        while (done < end) {
            uint32_t rows = (uint32_t)(end - done < batch ? end - done : batch);

            m->first = (uint32_t)done;
            if (graph_store_read(drafts, m->first, rows, m->drafts, err) < 0)
                goto done;
            pool_for(m->pool, rows, FINISH_ROWS, finish_tasks, m);
            if (first_error(m, err) < 0 || job_advance(m->job, 0, err) < 0 ||
                graph_store_write(graph, m->first, rows, m->drafts, err) < 0)
                goto done;
            done += rows;
        }
        if (done == m->store->count || journal_commit_due(m->journal)) {
            if (graph_store_sync(graph, err) < 0 ||
                manifest_set_u64(journal_state(m->journal), "graph.finished", done, err) < 0 ||
                journal_commit(m->journal, err) < 0)
                goto done;
        }
    }
    rc = 0;
done:
    free(m->offsets);
    free(m->counts);
    free(m->totals);
    free(m->sources);
    free(m->drafts);
    m->offsets = NULL;
    m->counts = m->totals = m->sources = m->drafts = NULL;
    graph_store_close(graph);
    return rc;
}

/* ---- the whole ---- */

static void params_default(struct leaf_graph_params *params)
{
    if (!params->probes)
        params->probes = PROBES_DEFAULT;
    if (!params->pool) {
        params->pool = 2 * params->max_degree;
        params->pool = params->pool < 96 ? 96 : params->pool > 192 ? 192 : params->pool;
    }
}

static uint64_t gather_room(const struct row_shape *shape, uint32_t prune_limit)
{
    uint64_t room = GATHER_BYTES / shape->stride, least = prune_limit + 1 + FAR_ROWS;

    return room > least ? room : least;
}

static uint64_t worker_bytes(const struct row_shape *shape, const struct leaf_graph_params *params,
                             uint32_t prune_limit, bool held)
{
    uint64_t probes = params->probes, pool = params->pool;
    uint64_t room = gather_room(shape, prune_limit);

    return TASK_ROWS *
               (probes * 12 + 8 + LEAF_CHUNK * 4 + 2 * pool * 8 + sizeof(struct block_pool)) +
           LEAF_CHUNK * 4 +
           (held ? 0 : (TASK_ROWS + LEAF_CHUNK + room) * shape->stride + room * sizeof(uint32_t)) +
           prune_scratch_memory_bytes(prune_limit, params->max_degree) +
           params->max_degree * sizeof(uint32_t);
}

static uint32_t prune_limit_of(const struct leaf_graph_params *params)
{
    uint32_t finish = params->max_degree + REVERSE_MAX;

    return params->pool + FAR_ROWS > finish ? params->pool + FAR_ROWS : finish;
}

uint64_t leaf_graph_memory_bytes(const struct row_shape *shape, uint64_t count,
                                 const struct leaf_graph_params *given, uint32_t workers, bool held)
{
    struct leaf_graph_params params = *given;
    uint64_t leaves = (count + PARTITION_LEAF_ROWS - 1) / PARTITION_LEAF_ROWS;
    uint64_t groups = (leaves + ROW_STORE_GROUP - 1) / ROW_STORE_GROUP;
    uint64_t batch = batch_rows(count), range = count < EDGE_RUNS_RANGE ? count : EDGE_RUNS_RANGE;
    uint64_t drafts, finish;

    params_default(&params);
    drafts = batch * (LEAF_GRAPH_LIST_PLACES + params.max_degree + 4) * 4;
    /* Sources: the mean degree for every row of a range, and half as much for uneven ranges. */
    finish = EDGE_RUNS_RANGE * 16ull + range * params.max_degree * 6ull +
             batch * (params.max_degree + 2) * 4;
    return (drafts > finish ? drafts : finish) + edge_runs_memory_bytes(count) +
           leaves * (4 + shape->space_dim * 4ull) + groups * (shape->space_dim * 4ull) +
           leaf_finder_memory_bytes(shape, (uint32_t)leaves, workers) +
           workers * (worker_bytes(shape, &params, prune_limit_of(&params), held) + groups * 8 +
                      (600u << 10));
}

uint64_t leaf_graph_scratch_bytes(uint64_t count, const struct leaf_graph_params *params)
{
    return count * ((LEAF_GRAPH_LIST_PLACES + 2) * 4ull + 2 * (params->max_degree + 2) * 4ull +
                    params->max_degree * 3ull / 4 * sizeof(struct edge));
}

static void worker_release(struct worker *w)
{
    leaf_finder_scratch_free(w->finder);
    free(w->leaves);
    free(w->pairs);
    free(w->rows);
    free(w->leaf_rows);
    free(w->norms);
    free(w->leaf_norms);
    free(w->distances);
    free(w->picks);
    free(w->pools);
    free(w->pool_distances);
    free(w->pool_ids);
    prune_scratch_release(&w->prune);
    free(w->gathered);
    free(w->gather_ids);
    free(w->kept);
}

static int worker_init(const struct making *m, struct worker *w, struct error *err)
{
    const struct row_shape *shape = &m->store->shape;
    uint64_t probes = m->params.probes, pool = m->params.pool;

    w->leaves = malloc(TASK_ROWS * probes * sizeof *w->leaves);
    w->pairs = malloc(TASK_ROWS * probes * sizeof *w->pairs);
    w->norms = malloc(TASK_ROWS * sizeof *w->norms);
    w->leaf_norms = malloc(LEAF_CHUNK * sizeof *w->leaf_norms);
    w->distances = malloc((uint64_t)TASK_ROWS * LEAF_CHUNK * sizeof *w->distances);
    w->picks = malloc(TASK_ROWS * sizeof *w->picks);
    w->pools = malloc(TASK_ROWS * sizeof *w->pools);
    w->pool_distances = malloc(TASK_ROWS * 2 * pool * sizeof *w->pool_distances);
    w->pool_ids = malloc(TASK_ROWS * 2 * pool * sizeof *w->pool_ids);
    w->kept = malloc(m->params.max_degree * sizeof *w->kept);
    if (!w->leaves || !w->pairs || !w->norms || !w->leaf_norms || !w->distances || !w->picks ||
        !w->pools || !w->pool_distances || !w->pool_ids || !w->kept)
        goto nomem;
    if (!m->store->resident) {
        w->gather_room = gather_room(shape, m->prune_limit);
        w->rows = file_buffer_alloc(TASK_ROWS * shape->stride);
        w->leaf_rows = file_buffer_alloc(LEAF_CHUNK * shape->stride);
        w->gathered = file_buffer_alloc(w->gather_room * shape->stride);
        w->gather_ids = malloc(w->gather_room * sizeof *w->gather_ids);
        if (!w->rows || !w->leaf_rows || !w->gathered || !w->gather_ids)
            goto nomem;
    }
    if (prune_scratch_init(&w->prune, m->prune_limit, m->params.max_degree, err) < 0)
        return -1;
    return leaf_finder_scratch_new(m->finder, TASK_ROWS, m->params.probes, &w->finder, err);
nomem:
    return error_set(err, ERR_NOMEM, "no memory for a worker of the graph build");
}

static int prepare(struct making *m, struct error *err)
{
    const struct row_store *store = m->store;
    uint32_t dim = store->shape.space_dim;

    params_default(&m->params);
    m->prune_limit = prune_limit_of(&m->params);
    if (store->resident) {
        const struct vector_matrix matrix = row_store_matrix(store);

        if (row_space_init(&m->held, &matrix, err) < 0)
            return -1;
    }
    m->group_centroids = calloc((uint64_t)store->group_count * dim, sizeof *m->group_centroids);
    m->workers = calloc(m->worker_count, sizeof *m->workers);
    if (!m->group_centroids || !m->workers)
        return error_set(err, ERR_NOMEM, "no memory for %" PRIu32 " groups of leaves",
                         store->group_count);
    for (uint32_t leaf = 0; leaf < store->leaf_count; leaf++) {
        uint32_t begin = leaf / ROW_STORE_GROUP * ROW_STORE_GROUP;
        uint32_t members = store->leaf_count - begin < ROW_STORE_GROUP ? store->leaf_count - begin
                                                                       : ROW_STORE_GROUP;
        float *sum = m->group_centroids + (uint64_t)(leaf / ROW_STORE_GROUP) * dim;

        for (uint32_t d = 0; d < dim; d++)
            sum[d] += store->centroids[(uint64_t)leaf * dim + d] / (float)members;
    }
    if (leaf_finder_new(&store->shape, store->centroids, store->leaf_count, &m->finder, err) < 0)
        return -1;
    for (uint32_t i = 0; i < m->worker_count; i++)
        if (worker_init(m, &m->workers[i], err) < 0)
            return -1;
    return 0;
}

int leaf_graph_make(struct vfs *vfs, const struct row_store *store,
                    const struct leaf_graph_params *params, uint64_t memory_bytes,
                    struct journal *journal, struct pool *pool, struct job *job, struct error *err)
{
    struct making m = {.vfs = vfs,
                       .store = store,
                       .params = *params,
                       .journal = journal,
                       .pool = pool,
                       .job = job,
                       .worker_count = pool ? pool_workers(pool) : 1};
    struct graph_store *drafts = NULL;
    struct edge_runs *runs = NULL;
    char path[FILE_PATH_MAX];
    uint64_t drafted = state_u64(journal, "graph.drafted");
    int rc = -1;

    if (memory_bytes && leaf_graph_memory_bytes(&store->shape, store->count, params, m.worker_count,
                                                store->resident != NULL) > memory_bytes)
        return error_set(err, ERR_BUDGET, "%" PRIu64 " MiB do not hold what makes a graph",
                         memory_bytes >> 20);
    if (drafted > store->count || state_u64(journal, "graph.finished") > drafted)
        return error_set(err, ERR_CORRUPT, "the build's state speaks of more rows than there are");
    if (prepare(&m, err) < 0 || journal_scratch_path(journal, "edges", path, err) < 0 ||
        edge_runs_open(vfs, path, store->count, state_u64(journal, "graph.edge_blocks"), &runs,
                       err) < 0 ||
        graph_store_open(vfs, journal, "draft", store->count, m.params.max_degree, drafted == 0,
                         &drafts, err) < 0)
        goto done;
    if (make_drafts(&m, drafts, runs, err) < 0 || make_final(&m, drafts, runs, err) < 0)
        goto done;
    rc = 0;
done:
    for (uint32_t i = 0; m.workers && i < m.worker_count; i++)
        worker_release(&m.workers[i]);
    free(m.workers);
    free(m.group_centroids);
    leaf_finder_free(m.finder);
    graph_store_close(drafts);
    edge_runs_close(runs);
    return rc;
}
