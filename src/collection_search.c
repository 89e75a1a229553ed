/* The window slides: whoever ends a task submits the next ones, under the search's own mutex. The
 * last one out calls `done`. A task that fails stops the rest; those in the engine are waited for,
 * because they write into our arrays. */
#include "src/collection_search.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW 64u /* tasks of one request in the engine at a time */

struct collection_search {
    struct search_engine *engine;
    const struct index_directory *index;
    const struct search_request *request;
    struct arena *arena;
    struct search_task *tasks; /* query-major */
    uint32_t *segments;        /* that hold the field */
    uint32_t segment_count;
    uint32_t task_count;
    uint32_t topk;
    pthread_mutex_t mutex; /* what follows */
    uint32_t next;
    uint32_t in_flight;
    bool stopped;
    struct error error;
    void (*done)(void *context);
    void *context;
};

/* Mutex held. */
static void pump(struct collection_search *search)
{
    struct error err = ERROR_INIT;

    while (!search->stopped && search->next < search->task_count && search->in_flight < WINDOW) {
        search->in_flight++;
        if (search_engine_submit(search->engine, &search->tasks[search->next], &err) < 0) {
            search->in_flight--;
            /* Full just now: the next of ours to end tries again, if there is one. */
            if (err.code != ERR_BUSY || search->in_flight == 0) {
                search->error = err;
                search->stopped = true;
            }
            return;
        }
        search->next++;
    }
}

static void task_done(struct search_task *task)
{
    struct collection_search *search = task->context;
    void (*done)(void *) = search->done;
    void *context = search->context;
    bool last;

    pthread_mutex_lock(&search->mutex);
    search->in_flight--;
    if (task->error.code != ERR_NONE && !search->stopped) {
        search->error = task->error;
        search->stopped = true;
    }
    pump(search);
    last = search->in_flight == 0 && (search->stopped || search->next == search->task_count);
    pthread_mutex_unlock(&search->mutex);
    if (last)
        done(context);
}

int collection_search_start(struct search_engine *engine, const struct index_directory *index,
                            uint32_t field, const struct search_request *request,
                            struct arena *arena, void (*done)(void *context), void *context,
                            struct collection_search **out, struct error *err)
{
    struct collection_search *search = arena_alloc(arena, sizeof *search);
    uint32_t topk = (uint32_t)(request->limit + request->offset);
    uint32_t list = request_search_list(&request->tuning, topk);
    uint64_t task_count;
    bool started;

    if (!search)
        goto nomem;
    *search = (struct collection_search){
        .engine = engine,
        .index = index,
        .request = request,
        .arena = arena,
        .topk = topk,
        .done = done,
        .context = context,
    };
    search->segments = arena_alloc(arena, (index->segment_count + 1ull) * sizeof *search->segments);
    if (!search->segments)
        goto nomem;
    for (uint32_t i = 0; i < index->segment_count; i++) {
        if (field < index->segments[i].field_count && index->segments[i].fields[field] &&
            index->segments[i].fields[field]->row_count > 0)
            search->segments[search->segment_count++] = i;
    }
    task_count = (uint64_t)request->query_count * search->segment_count;
    if (task_count > UINT32_MAX)
        goto nomem;
    search->task_count = (uint32_t)task_count;
    search->tasks = arena_alloc(arena, task_count * sizeof *search->tasks);
    if (!search->tasks)
        goto nomem;
    for (uint32_t i = 0; i < search->task_count; i++) {
        uint32_t part = search->segments[i % search->segment_count];
        const struct disk_index *part_index = index->segments[part].fields[field];
        struct search_task *task = &search->tasks[i];
        /* A segment has no more to give than its rows. */
        uint32_t k = topk < part_index->row_count ? topk : part_index->row_count;

        task->index = part_index;
        task->query = request->queries[i / search->segment_count];
        task->params.k = k;
        task->params.search_list = list;
        task->params.beam_width =
            request->tuning.beam_width ? request->tuning.beam_width : REQUEST_BEAM_WIDTH_DEFAULT;
        task->params.deadline_us = request->deadline_us;
        task->params.cancelled = request->cancelled;
        task->hits = arena_alloc(arena, (size_t)k * sizeof *task->hits);
        task->done = task_done;
        task->context = search;
        if (!task->hits)
            goto nomem;
    }
    pthread_mutex_init(&search->mutex, NULL);
    *out = search;
    if (search->task_count == 0) {
        done(context);
        return 0;
    }
    pthread_mutex_lock(&search->mutex);
    pump(search);
    started = search->next > 0;
    if (!started)
        *err = search->error;
    pthread_mutex_unlock(&search->mutex);
    return started ? 0 : -1;
nomem:
    return error_set(err, ERR_BUDGET,
                     "a search of %u queries for %u rows each needs more memory "
                     "than a request may take",
                     request->query_count, topk);
}

static int compare_rows(const void *left, const void *right)
{
    const struct result_row *a = left;
    const struct result_row *b = right;

    if (a->distance != b->distance)
        return a->distance < b->distance ? -1 : 1;
    if (a->key != b->key)
        return a->key < b->key ? -1 : 1;
    return a->segment < b->segment ? -1 : a->segment > b->segment;
}

int collection_search_finish(struct collection_search *search, struct result_row **rows,
                             uint32_t *row_count, uint32_t **counts, struct search_totals *totals,
                             struct error *err)
{
    uint32_t queries = search->request->query_count;
    uint32_t offset = (uint32_t)search->request->offset;
    uint64_t hit_count = 0;
    struct result_row *out;
    uint32_t written = 0;

    pthread_mutex_destroy(&search->mutex);
    memset(totals, 0, sizeof *totals);
    if (search->error.code != ERR_NONE) {
        *err = search->error;
        return -1;
    }
    for (uint32_t i = 0; i < search->task_count; i++)
        hit_count += search->tasks[i].hit_count;
    out = arena_alloc(search->arena, (size_t)(hit_count + 1) * sizeof *out);
    *counts = arena_alloc(search->arena, (queries + 1ull) * sizeof **counts);
    if (!out || !*counts)
        return error_set(err, ERR_BUDGET, "no memory for %llu results",
                         (unsigned long long)hit_count);
    for (uint32_t q = 0; q < queries; q++) {
        uint32_t first = written;
        uint32_t found;

        for (uint32_t s = 0; s < search->segment_count; s++) {
            const struct search_task *task = &search->tasks[q * search->segment_count + s];

            for (uint32_t h = 0; h < task->hit_count; h++) {
                out[written++] = (struct result_row){
                    .segment = search->segments[s],
                    .position = task->hits[h].position,
                    .key = task->hits[h].key,
                    .distance = task->hits[h].distance,
                };
            }
            totals->rounds += task->stats.rounds;
            totals->reads += task->stats.reads;
            totals->resident_hits += task->stats.resident_hits;
            totals->exact += task->stats.exact;
        }
        found = written - first;
        if (search->segment_count > 1)
            qsort(out + first, found, sizeof *out, compare_rows);
        if (found > search->topk)
            found = search->topk;
        found = found > offset ? found - offset : 0;
        memmove(out + first, out + first + offset, found * sizeof *out);
        written = first + found;
        (*counts)[q] = found;
    }
    *rows = out;
    *row_count = written;
    return 0;
}
