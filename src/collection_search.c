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
    struct search_part *parts; /* segments that hold the field */
    uint32_t part_count;
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

/* NULL: the segment has no rows of the field. */
static const struct disk_index *segment_index(const struct index_directory *index, uint32_t segment,
                                              uint32_t field)
{
    const struct disk_index *found = field < index->segments[segment].field_count
                                         ? index->segments[segment].fields[field]
                                         : NULL;

    return found && found->row_count > 0 ? found : NULL;
}

/* Rows of one segment that may be asked for, and the rule that finds them. */
static void part_make(struct search_part *part, uint32_t segment, const struct disk_index *index,
                      const struct search_request *request, uint32_t topk, uint32_t part_count)
{
    const struct search_tuning *tuning = &request->tuning;
    uint32_t reads_max = tuning->reads_max;
    /* A segment has no more to give than its rows. */
    uint32_t k = topk < index->row_count ? topk : index->row_count;

    part->segment = segment;
    part->index = index;
    part->calibrated = index->calibration && index->calibration->curve_count > 0;
    request_search_effort(tuning, k, part->calibrated, &part->effort);
    part->params = (struct search_params){
        .k = k,
        .beam_width = tuning->beam_width ? tuning->beam_width : REQUEST_BEAM_WIDTH_DEFAULT,
        .early_reads = tuning->early_reads,
        .exact_scores = tuning->exact_scores,
        .explain = tuning->explain,
        .deadline_us = request->deadline_us,
        .cancelled = request->cancelled,
    };
    if (reads_max > 0)
        part->params.reads_max = reads_max > part_count ? reads_max / part_count : 1;
    if (part->effort.recall_target > 0)
        walk_rule_for_recall(index->calibration, part->effort.recall_target, k,
                             disk_index_resident_share(index), &part->params.rule,
                             &part->reads_expected);
    else
        walk_rule_for_list(index->calibration, part->effort.search_list, k, &part->params.rule);
}

int collection_search_start(struct search_engine *engine, const struct index_directory *index,
                            uint32_t field, const struct search_request *request,
                            struct arena *arena, void (*done)(void *context), void *context,
                            struct collection_search **out, struct error *err)
{
    struct collection_search *search = arena_alloc(arena, sizeof *search);
    uint32_t topk = (uint32_t)(request->limit + request->offset);
    uint32_t part_count = 0;
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
    for (uint32_t i = 0; i < index->segment_count; i++)
        part_count += segment_index(index, i, field) != NULL;
    search->parts = arena_alloc(arena, (part_count + 1ull) * sizeof *search->parts);
    if (!search->parts)
        goto nomem;
    for (uint32_t i = 0; i < index->segment_count; i++) {
        const struct disk_index *part_index = segment_index(index, i, field);

        if (part_index)
            part_make(&search->parts[search->part_count++], i, part_index, request, topk,
                      part_count);
    }
    task_count = (uint64_t)request->query_count * part_count;
    if (task_count > UINT32_MAX)
        goto nomem;
    search->task_count = (uint32_t)task_count;
    search->tasks = arena_alloc(arena, task_count * sizeof *search->tasks);
    if (!search->tasks)
        goto nomem;
    for (uint32_t i = 0; i < search->task_count; i++) {
        const struct search_part *part = &search->parts[i % part_count];
        struct search_task *task = &search->tasks[i];

        task->index = part->index;
        task->query = request->queries[i / part_count];
        task->params = part->params;
        task->hits = arena_alloc(arena, (size_t)part->params.k * sizeof *task->hits);
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

        for (uint32_t s = 0; s < search->part_count; s++) {
            const struct search_task *task = &search->tasks[q * search->part_count + s];

            for (uint32_t h = 0; h < task->hit_count; h++) {
                out[written++] = (struct result_row){
                    .segment = search->parts[s].segment,
                    .position = task->hits[h].position,
                    .key = task->hits[h].key,
                    .distance = task->hits[h].distance,
                };
            }
            totals->rounds += task->stats.rounds;
            totals->reads += task->stats.reads;
            totals->resident_hits += task->stats.resident_hits;
            totals->scanned += task->stats.scanned;
            totals->estimates += task->stats.estimates;
            totals->exact += task->stats.exact;
            if (task->stats.stop <= STOP_READS)
                totals->stops[task->stats.stop]++;
        }
        found = written - first;
        if (search->part_count > 1)
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

uint32_t collection_search_parts(const struct collection_search *search,
                                 const struct search_part **parts)
{
    *parts = search->parts;
    return search->part_count;
}

void collection_search_query(const struct collection_search *search, uint32_t query,
                             struct search_stats *stats, bool stopped[STOP_READS + 1])
{
    memset(stats, 0, sizeof *stats);
    memset(stopped, 0, (STOP_READS + 1) * sizeof *stopped);
    for (uint32_t s = 0; s < search->part_count; s++) {
        const struct search_stats *one = &search->tasks[query * search->part_count + s].stats;

        if (one->rounds > stats->rounds)
            stats->rounds = one->rounds;
        if (one->latency_us > stats->latency_us)
            stats->latency_us = one->latency_us;
        stats->reads += one->reads;
        stats->resident_hits += one->resident_hits;
        stats->expanded += one->expanded;
        stats->cells += one->cells;
        stats->scanned += one->scanned;
        stats->estimates += one->estimates;
        stats->exact += one->exact;
        stats->read_bytes += one->read_bytes;
        stats->gain += one->gain;
        stats->prepare_us += one->prepare_us;
        stats->seed_us += one->seed_us;
        stats->score_us += one->score_us;
        stats->expand_us += one->expand_us;
        stats->exact_us += one->exact_us;
        stats->stop = s == 0 || one->stop == stats->stop ? one->stop : STOP_NONE;
        if (one->stop <= STOP_READS)
            stopped[one->stop] = true;
    }
}
