/* How it works: a query is walked once per k and share of resident pages, under a rule laxer in
 * nothing than any that is offered, while an observer notes every moment at which some rule could
 * have stopped: the reads so far, how quiet they were, the gain to be expected, the true hits. What
 * a rule (patience, gain) would have answered is then looked up: the first moment that meets it. A
 * walk has one read in flight here. There stopping is final, so the look-up is exact; with more in
 * flight a walk ends in a state that meets the same rule, after a few reads more.
 *
 * Of the rules of a grid, a chain that gets stricter with every target is chosen, so that the sum
 * over the targets of their reads, each relative to the fewest that would reach it alone, is least
 * (dynamic programming over the grid). That is done for several efforts, each scanning more cells
 * for seeds than the one before and following more edges, at least until no target is missed: for
 * CPU time they spare reads, and find what the graph does not lead to. A target goes to the effort
 * that reaches it at the least cost, reads and CPU time taken together (cost_of); greater ones from
 * there on. Sums are of whole numbers and all choices are made by one thread: the result does not
 * depend on the pool. */
#include "index/calibrate.h"

#include <inttypes.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "index/disk_search.h"
#include "storage/file.h"

#define KS 3u
#define SHARES_MAX 4u
#define SHARE_LEAST 200u /* a curve of its own from one page in so many on */
#define WALKS 8u /* of one worker at once, so that its core does not wait for single reads */
#define GRAIN 16u
#define EFFORTS 5u
#define EFFORTS_MIN 3u /* measured in any case */
#define TRUTH_BITS 9u
#define TRUTH_PLACES (1u << TRUTH_BITS) /* more than twice the greatest k */
#define PLACE_FREE 0u
#define PLACE_TAKEN UINT32_MAX /* being filled */
#define CACHE_BYTES_MAX (1ull << 30)
#define READS_PER_LISTED 4u /* bounds a walk, and with it its trace */
#define PATIENCES 10u
#define PATIENCES_SHORT 8u /* of them for all efforts but the last: long walks take their time */
#define PATIENCE_MAX 32u
#define GAINS_MAX 96u
#define GAIN_RATIO 0.85
#define GAIN_LEAST 1e-4
#define GAIN_OFF 1e-6f /* as good as none: no candidate within reach is left unread */

/* Twice that for k = 100. */
static const struct {
    uint32_t search_list;
    uint32_t cells;
} efforts[EFFORTS] = {{120, 50}, {250, 100}, {250, 200}, {400, 400}, {500, 800}};

static const uint32_t calibrated_k[KS] = {1, 10, 100};
/* Queries that walk at each k: where the index is to be served, and at the other shares. A query of
 * k 100 says more, and takes ten times as long, as one of k 10. */
static const uint32_t queries_main[KS] = {UINT32_MAX, UINT32_MAX, 250};
static const uint32_t queries_other[KS] = {300, UINT32_MAX, 150};
static const uint32_t patiences[PATIENCES] = {0, 1, 2, 3, 4, 6, 8, 10, 16, PATIENCE_MAX};
static const float targets[] = {0.80f,  0.85f, 0.90f,  0.93f,   0.95f,  0.97f, 0.98f,
                                0.985f, 0.99f, 0.995f, 0.9965f, 0.998f, 0.999f};

#define TARGETS (sizeof targets / sizeof targets[0])

/* ---- walks ---- */

struct moment {
    uint32_t reads; /* pages */
    float gain;
    uint16_t quiet; /* PATIENCE_MAX at most */
    uint16_t hits;  /* true ones */
};

/* What one query's walk told. */
struct trace {
    struct moment *moments; /* in the order of reads */
    uint32_t count;
    uint32_t reads; /* of the whole walk */
    uint32_t hits;  /* at its end */
    uint32_t codes; /* scanned for seeds */
};

/* One query under way. */
struct walk {
    const struct run *run;
    struct disk_search *search;
    struct search_hit *hits;
    struct moment *moments;
    uint32_t count;
    uint32_t query; /* of the run's */
    bool busy;
    float lowest[PATIENCE_MAX + 1]; /* gain noted so far with at least so much quiet */
    uint32_t truth[TRUTH_PLACES];   /* the query's, a table by hash of positions */
    uint32_t counted_last;          /* the last hit when `counted` was made, UINT32_MAX: never */
    uint32_t counted;               /* true hits */
};

/* A worker's. */
struct crew {
    struct walk_scratch *scratch;
    struct walk walks[WALKS];
    struct error error;
};

/* Pages that were read once, for the walks to come at the same share. A page has one place it may
 * take, and the first to come keeps it: so a worker fills a place and the others read it without a
 * lock. Walks count their reads all the same: results do not depend on what is found here. */
struct page_cache {
    uint8_t *pages;          /* place_count x page_bytes */
    _Atomic uint32_t *holds; /* page + 1, or PLACE_FREE, PLACE_TAKEN */
    uint64_t place_count;    /* 0: no cache */
    uint32_t page_bytes;
};

/* What the queries of one share of resident pages do at one k. */
struct run {
    const struct disk_index *index;
    const struct calibrate_queries *queries;
    struct disk_search_limits limits;
    struct walk_rule rule;
    uint32_t patience_count; /* of the grid */
    uint32_t k;
    uint32_t count; /* of the queries that walk: query i is number i * all / count of all */
    struct trace *traces;
    struct crew *crews;
    struct page_cache cache;
    struct job *job;
    atomic_bool failed;
};

static uint32_t moments_max(const struct disk_search_limits *limits)
{
    return READS_PER_LISTED * limits->search_list_max + 1;
}

/* ---- pages read before ---- */

static void cache_release(struct page_cache *cache)
{
    free(cache->pages);
    free(cache->holds);
    *cache = (struct page_cache){0};
}

/* As large as what `memory_bytes_max` leaves beside the index and the workers' scratch; going
 * without is no error. Pages are touched as they are filled. */
static void cache_make(struct page_cache *cache, const struct run *run, uint32_t workers,
                       uint64_t memory_bytes_max)
{
    const struct disk_index *index = run->index;
    uint64_t pages = index->format.page_count - index->resident_page_count;
    uint64_t place_bytes = index->format.page_bytes + sizeof *cache->holds, room = CACHE_BYTES_MAX;
    uint64_t held = index->memory_bytes +
                    workers * (walk_scratch_memory_bytes(&run->limits) +
                               WALKS * (disk_search_memory_bytes(&run->limits) +
                                        moments_max(&run->limits) * sizeof(struct moment)));

    cache_release(cache);
    if (memory_bytes_max)
        held = memory_bytes_max > held ? memory_bytes_max - held : 0;
    if (memory_bytes_max && held < room)
        room = held;
    if (room / place_bytes < pages)
        pages = room / place_bytes;
    if (!pages)
        return;
    cache->pages = malloc(pages * index->format.page_bytes);
    cache->holds = calloc(pages, sizeof *cache->holds);
    if (!cache->pages || !cache->holds) {
        cache_release(cache);
        return;
    }
    cache->page_bytes = index->format.page_bytes;
    cache->place_count = pages;
}

static uint64_t page_of(const struct run *run, const struct reader_read *read)
{
    return read->offset / run->index->format.page_bytes;
}

static bool cache_get(struct run *run, struct reader_read *read)
{
    struct page_cache *cache = &run->cache;
    uint64_t page = page_of(run, read), place;

    if (!cache->place_count)
        return false;
    place = page % cache->place_count;
    if (atomic_load_explicit(&cache->holds[place], memory_order_acquire) != page + 1)
        return false;
    memcpy(read->buffer, cache->pages + place * cache->page_bytes, cache->page_bytes);
    return true;
}

/* What was read may be damaged: whoever gets it checks it. */
static void cache_put(struct run *run, const struct reader_read *read)
{
    struct page_cache *cache = &run->cache;
    uint64_t page = page_of(run, read), place;
    uint32_t free_place = PLACE_FREE;

    if (!cache->place_count || read->error)
        return;
    place = page % cache->place_count;
    if (!atomic_compare_exchange_strong(&cache->holds[place], &free_place, PLACE_TAKEN))
        return;
    memcpy(cache->pages + place * cache->page_bytes, read->buffer, cache->page_bytes);
    atomic_store_explicit(&cache->holds[place], (uint32_t)page + 1, memory_order_release);
}

/* ---- one walk ---- */

static uint32_t query_number(const struct run *run, uint32_t query)
{
    return (uint32_t)((uint64_t)query * run->queries->count / run->count);
}

static uint32_t *truth_place(uint32_t *truth, uint32_t position)
{
    uint32_t i = (position * 2654435769u) >> (32 - TRUTH_BITS); /* 2^32 / golden ratio */

    while (truth[i] != UINT32_MAX && truth[i] != position)
        i = (i + 1) % TRUTH_PLACES;
    return &truth[i];
}

static void truth_begin(struct walk *walk, uint32_t number)
{
    const struct calibrate_queries *queries = walk->run->queries;

    memset(walk->truth, 0xff, sizeof walk->truth);
    for (uint32_t i = 0; i < walk->run->k; i++) {
        uint32_t position = queries->truth[(uint64_t)number * queries->truth_k + i];

        *truth_place(walk->truth, position) = position;
    }
    walk->counted_last = UINT32_MAX;
}

/* Of a full list of hits the last one leaves when another enters, and never comes back: the same
 * last one means the same hits. */
static uint32_t true_hits(struct walk *walk, const struct search_hit *hits, uint32_t count)
{
    bool full = count == walk->run->k;

    if (full && walk->counted_last == hits[count - 1].position)
        return walk->counted;
    walk->counted = 0;
    for (uint32_t i = 0; i < count; i++)
        walk->counted += *truth_place(walk->truth, hits[i].position) == hits[i].position;
    walk->counted_last = full ? hits[count - 1].position : UINT32_MAX;
    return walk->counted;
}

/* Notes a moment unless every rule it meets was met before, by one as quiet and of no more gain. */
static void observe(void *context, const struct search_moment *moment)
{
    struct walk *walk = context;
    uint32_t quiet = moment->quiet < PATIENCE_MAX ? moment->quiet : PATIENCE_MAX;

    if (moment->hit_count < walk->run->k || !(moment->gain < walk->lowest[quiet]) ||
        walk->count == moments_max(&walk->run->limits))
        return;
    for (uint32_t q = 0; q <= quiet; q++)
        walk->lowest[q] = moment->gain < walk->lowest[q] ? moment->gain : walk->lowest[q];
    walk->moments[walk->count++] = (struct moment){
        .reads = moment->reads,
        .gain = moment->gain,
        .quiet = (uint16_t)quiet,
        .hits = (uint16_t)true_hits(walk, moment->hits, moment->hit_count),
    };
}

static int walk_begin(struct walk *walk, uint32_t query, struct error *err)
{
    const struct run *run = walk->run;
    uint32_t number = query_number(run, query);
    const struct search_params params = {
        .k = run->k,
        .rule = run->rule,
        .beam_width = 1,
        .reads_max = READS_PER_LISTED * run->rule.search_list,
        .hidden = run->queries->hidden ? &run->queries->hidden[number] : NULL,
        .observe = observe,
        .observe_context = walk,
    };

    walk->query = query;
    walk->count = 0;
    truth_begin(walk, number);
    for (uint32_t q = 0; q <= PATIENCE_MAX; q++)
        walk->lowest[q] = INFINITY;
    if (disk_search_begin(walk->search, run->index,
                          run->queries->vectors + (uint64_t)number * run->index->dim, &params,
                          err) < 0)
        return -1;
    walk->busy = true;
    return 0;
}

static int walk_end(struct walk *walk, struct error *err)
{
    const struct run *run = walk->run;
    struct trace *trace = &run->traces[walk->query];
    uint32_t count;

    walk->busy = false;
    if (disk_search_error(walk->search, err) < 0)
        return -1;
    count = disk_search_hits(walk->search, walk->hits, run->k);
    trace->hits = true_hits(walk, walk->hits, count);
    trace->reads =
        (uint32_t)(disk_search_stats(walk->search)->read_bytes / run->index->format.page_bytes);
    trace->codes = disk_search_stats(walk->search)->scanned;
    trace->count = walk->count;
    if (!walk->count)
        return 0;
    trace->moments = malloc(walk->count * sizeof *trace->moments);
    if (!trace->moments)
        return error_set(err, ERR_NOMEM, "no memory for a walk of %" PRIu32 " moments",
                         walk->count);
    memcpy(trace->moments, walk->moments, walk->count * sizeof *trace->moments);
    return 0;
}

static void crew_release(struct crew *crew)
{
    for (uint32_t w = 0; w < WALKS; w++) {
        disk_search_free(crew->walks[w].search);
        free(crew->walks[w].hits);
        free(crew->walks[w].moments);
    }
    walk_scratch_free(crew->scratch);
}

/* By the worker itself, on its first range. */
static int crew_prepare(const struct run *run, struct crew *crew)
{
    if (!crew->scratch && walk_scratch_new(&run->limits, &crew->scratch, &crew->error) < 0)
        return -1;
    for (uint32_t w = 0; w < WALKS; w++) {
        struct walk *walk = &crew->walks[w];

        walk->run = run;
        walk->busy = false;
        if (walk->search)
            continue;
        walk->hits = malloc(run->limits.k_max * sizeof *walk->hits);
        walk->moments = malloc(moments_max(&run->limits) * sizeof *walk->moments);
        if (!walk->hits || !walk->moments) {
            free(walk->hits);
            free(walk->moments);
            walk->hits = NULL;
            walk->moments = NULL;
            return error_set(&crew->error, ERR_NOMEM, "no memory for the traces of a walk");
        }
        if (disk_search_new(&run->limits, crew->scratch, &walk->search, &crew->error) < 0)
            return -1;
    }
    return 0;
}

/* Goes on with a walk until it is done or waits for the disk: then *read is what for, else NULL. */
static int walk_on(struct run *run, struct walk *walk, struct reader_read **read, struct error *err)
{
    while (disk_search_wanted(walk->search, read, 1)) {
        if (!cache_get(run, *read))
            return 0;
        if (disk_search_arrived(walk->search, *read, err) < 0)
            return -1;
    }
    *read = NULL; /* nothing wanted and nothing in flight: done */
    return walk_end(walk, err) < 0 ? -1 : job_advance(run->job, 1, err);
}

static struct walk *walk_of(struct crew *crew, const void *search)
{
    uint32_t w = 0;

    while (crew->walks[w].search != search)
        w++;
    return &crew->walks[w];
}

/* Walks queries [begin, end). A reader is its thread's own, so it lives no longer than this; it is
 * opened when something is to be read. */
static void measure_range(void *context, uint64_t begin, uint64_t end, uint32_t worker)
{
    struct run *run = context;
    struct crew *crew = &run->crews[worker];
    struct reader_read *wanted[WALKS], *done[WALKS], *read;
    struct reader *reader = NULL;
    uint64_t next = begin;
    uint32_t wanted_count = 0, done_count;

    if (atomic_load(&run->failed))
        return;
    if (crew_prepare(run, crew) < 0)
        goto done;
    for (;;) {
        for (uint32_t w = 0; w < WALKS; w++) {
            struct walk *walk = &crew->walks[w];

            while (!walk->busy && next < end) {
                if (walk_begin(walk, (uint32_t)next++, &crew->error) < 0 ||
                    walk_on(run, walk, &read, &crew->error) < 0)
                    goto done;
                if (read)
                    wanted[wanted_count++] = read;
            }
        }
        if (!wanted_count && (!reader || !reader_in_flight(reader)))
            break;
        if (!reader && reader_open(READER_AUTO, WALKS, &reader, &crew->error) < 0)
            goto done;
        /* What could not be submitted comes back from reader_wait with its error. */
        if (wanted_count)
            reader_submit(reader, wanted, wanted_count, NULL);
        wanted_count = 0;
        done_count = reader_wait(reader, done, WALKS, true);
        for (uint32_t i = 0; i < done_count; i++) {
            struct walk *walk = walk_of(crew, done[i]->owner);

            cache_put(run, done[i]);
            if (disk_search_arrived(walk->search, done[i], &crew->error) < 0 ||
                walk_on(run, walk, &read, &crew->error) < 0)
                goto done;
            if (read)
                wanted[wanted_count++] = read;
        }
    }
done:
    reader_close(reader); /* waits: no read is under way in a search's buffers after it */
    if (crew->error.code != ERR_NONE)
        atomic_store(&run->failed, true);
}

static void traces_release(struct run *run)
{
    for (uint32_t q = 0; run->traces && q < run->count; q++)
        free(run->traces[q].moments);
    free(run->traces);
    run->traces = NULL;
}

/* ---- rules ---- */

/* What every rule of the grid would have answered, and the choice among them. Gains descend. */
struct grid {
    uint32_t patience_count;
    float gains[GAINS_MAX];
    uint32_t gain_count;
    uint64_t reads[PATIENCES][GAINS_MAX];
    uint64_t hits[PATIENCES][GAINS_MAX];
    uint64_t hits_squared[PATIENCES][GAINS_MAX];
    double recall[PATIENCES][GAINS_MAX];
    double sure[PATIENCES][GAINS_MAX]; /* recall less the margin */
    /* Least cost of a chain of targets that ends in this rule, or in this one or a laxer one. */
    double cost[PATIENCES][GAINS_MAX];
    double cost_up_to[PATIENCES][GAINS_MAX];
    uint16_t cell_up_to[PATIENCES][GAINS_MAX];
    uint16_t before[TARGETS][PATIENCES][GAINS_MAX]; /* the rule of the target before */
};

static void add(struct grid *grid, uint32_t p, uint32_t g, uint32_t reads, uint32_t hits)
{
    grid->reads[p][g] += reads;
    grid->hits[p][g] += hits;
    grid->hits_squared[p][g] += (uint64_t)hits * hits;
}

/* Fills the sums: a trace goes down the gains once for each patience. */
static void grid_fill(struct grid *grid, const struct run *run)
{
    uint32_t n = run->count;

    memset(grid, 0, sizeof *grid);
    grid->patience_count = run->patience_count;
    for (double gain = 4.0 * run->k / 10; gain >= GAIN_LEAST; gain *= GAIN_RATIO)
        grid->gains[grid->gain_count++] = (float)gain;
    grid->gains[grid->gain_count++] = GAIN_OFF;
    for (uint32_t q = 0; q < n; q++) {
        const struct trace *trace = &run->traces[q];

        for (uint32_t p = 0; p < grid->patience_count; p++) {
            uint32_t g = 0;

            for (uint32_t m = 0; m < trace->count; m++) {
                const struct moment *moment = &trace->moments[m];

                for (; moment->quiet >= patiences[p] && g < grid->gain_count &&
                       moment->gain < grid->gains[g];
                     g++)
                    add(grid, p, g, moment->reads, moment->hits);
            }
            for (; g < grid->gain_count; g++)
                add(grid, p, g, trace->reads, trace->hits);
        }
    }
    for (uint32_t p = 0; p < grid->patience_count; p++) {
        for (uint32_t g = 0; g < grid->gain_count; g++) {
            double mean = (double)grid->hits[p][g] / n;
            double variance = (double)grid->hits_squared[p][g] / n - mean * mean;
            double error = variance > 0 ? sqrt(variance / n) / run->k : 0;

            grid->recall[p][g] = mean / run->k;
            /* The cheapest of many rules that reached a target here is a little lucky: a third of
             * the standard error of the mean recall is asked for on top. */
            grid->sure[p][g] = grid->recall[p][g] - error / 3;
        }
    }
}

static double mean_reads(const struct grid *grid, uint32_t p, uint32_t g, uint32_t n)
{
    return (double)grid->reads[p][g] / n;
}

/* Extends all chains by one target: cost[][] becomes that of chains that end with it. False when no
 * rule reaches the target. */
static bool grid_step(struct grid *grid, uint32_t t, uint32_t n)
{
    double fewest = INFINITY;

    for (uint32_t p = 0; p < grid->patience_count; p++)
        for (uint32_t g = 0; g < grid->gain_count; g++)
            if (grid->sure[p][g] >= (double)targets[t] && mean_reads(grid, p, g, n) < fewest)
                fewest = mean_reads(grid, p, g, n);
    if (isinf(fewest))
        return false;
    for (uint32_t p = 0; p < grid->patience_count; p++) {
        for (uint32_t g = 0; g < grid->gain_count; g++) {
            bool reached = grid->sure[p][g] >= (double)targets[t];
            double laxer = t ? grid->cost_up_to[p][g] : 0;

            grid->before[t][p][g] = t ? grid->cell_up_to[p][g] : 0;
            /* One more than the reads, as all pages may be in memory. */
            grid->cost[p][g] =
                reached ? laxer + (mean_reads(grid, p, g, n) + 1) / (fewest + 1) : INFINITY;
        }
    }
    for (uint32_t p = 0; p < grid->patience_count; p++) {
        for (uint32_t g = 0; g < grid->gain_count; g++) {
            double best = grid->cost[p][g];
            uint16_t cell = (uint16_t)(p * GAINS_MAX + g);

            /* Of equals the stricter: when all pages are in memory any rule costs nothing. */
            if (p && grid->cost_up_to[p - 1][g] < best) {
                best = grid->cost_up_to[p - 1][g];
                cell = grid->cell_up_to[p - 1][g];
            }
            if (g && grid->cost_up_to[p][g - 1] < best) {
                best = grid->cost_up_to[p][g - 1];
                cell = grid->cell_up_to[p][g - 1];
            }
            grid->cost_up_to[p][g] = best;
            grid->cell_up_to[p][g] = cell;
        }
    }
    return true;
}

static void curve_fill(struct grid *grid, const struct run *run, struct walk_curve *curve)
{
    uint32_t n = run->count, reached = 0;
    uint32_t page_units = run->index->format.page_bytes / FILE_BLOCK_BYTES;
    uint32_t cells[TARGETS], last_gain, cell;

    grid_fill(grid, run);
    last_gain = grid->gain_count - 1;
    while (reached < TARGETS && grid_step(grid, reached, n))
        reached++;
    cell = grid->cell_up_to[grid->patience_count - 1][last_gain]; /* of all chains the best */
    for (uint32_t t = reached; t-- > 0; cell = grid->before[t][cell / GAINS_MAX][cell % GAINS_MAX])
        cells[t] = cell;
    for (uint32_t t = reached; t < TARGETS; t++)
        cells[t] = (grid->patience_count - 1) * GAINS_MAX + last_gain;
    curve->k = run->k;
    curve->resident_share = (float)disk_index_resident_share(run->index);
    curve->point_count = TARGETS;
    for (uint32_t t = 0; t < TARGETS; t++) {
        uint32_t p = cells[t] / GAINS_MAX, g = cells[t] % GAINS_MAX;

        curve->points[t] = (struct walk_point){
            .recall = targets[t],
            .rule = run->rule,
            .reached = (float)grid->recall[p][g],
            .reads = (float)(mean_reads(grid, p, g, n) * page_units),
        };
        curve->points[t].rule.patience = patiences[p];
        curve->points[t].rule.gain = grid->gains[g];
    }
}

/* ---- k and shares ---- */

/* codes: the mean of what a walk scans. */
static int effort_measure(struct run *run, uint32_t effort, struct grid *grid, struct pool *pool,
                          struct walk_curve *curve, double *codes, struct error *err)
{
    uint32_t count = run->count, workers = pool ? pool_workers(pool) : 1;
    uint32_t many = run->k >= 100 ? 2 : 1, cells = cells_count(run->index->cells);
    int rc = -1;

    if (many * efforts[effort].cells < cells)
        cells = many * efforts[effort].cells;
    run->patience_count = effort == EFFORTS - 1 ? PATIENCES : PATIENCES_SHORT;
    /* Patience too: whatever rule of the grid a walk meets, it meets before it ends. */
    run->rule = (struct walk_rule){.search_list = many * efforts[effort].search_list,
                                   .cells = cells,
                                   .patience = patiences[run->patience_count - 1],
                                   .gain = GAIN_OFF};
    run->traces = calloc(count, sizeof *run->traces);
    if (!run->traces)
        return error_set(err, ERR_NOMEM, "no memory for the calibration's %" PRIu32 " queries",
                         count);
    pool_for(pool, count, GRAIN, measure_range, run);
    for (uint32_t w = 0; w < workers; w++) {
        if (run->crews[w].error.code != ERR_NONE) {
            error_set(err, run->crews[w].error.code, "%s", run->crews[w].error.message);
            goto done;
        }
    }
    curve_fill(grid, run, curve);
    *codes = 0;
    for (uint32_t q = 0; q < count; q++)
        *codes += (double)run->traces[q].codes / count;
    rc = 0;
done:
    traces_release(run);
    return rc;
}

/* What a search costs, in microseconds of one core: a drive of some 85,000 reads a second beside
 * four cores gives 46 of them a read. Whichever of drive and cores has more to do decides; where
 * both have as much they are in each other's way. CPU times are those of one core at 2.5 GHz with
 * all of them busy; codes: those scanned. */
static double cost_of(const struct run *run, const struct walk_point *point, double codes)
{
    double cpu = 150 + 8 * (double)point->reads + 0.5 * point->rule.search_list +
                 0.0003 * codes * run->index->code_bytes;

    return hypot(46 * (double)point->reads, cpu);
}

/* A curve in the making: how many codes the effort of each point scans, the mean. */
struct choice {
    struct walk_curve *curve;
    double codes[TARGETS];
};

/* Takes over the points of a greater effort from the first target on that it serves better; from
 * there on all, so that rules get stricter with the target. True when targets are still missed. */
static bool effort_merge(const struct run *run, struct choice *choice,
                         const struct walk_curve *more, double codes)
{
    bool taken = false;

    for (uint32_t t = 0; t < TARGETS; t++) {
        struct walk_point *mine = &choice->curve->points[t];
        const struct walk_point *theirs = &more->points[t];

        if (mine->reached < targets[t])
            taken |= theirs->reached > mine->reached;
        else
            taken |= theirs->reached >= targets[t] &&
                     cost_of(run, theirs, codes) < cost_of(run, mine, choice->codes[t]);
        if (taken) {
            *mine = *theirs;
            choice->codes[t] = codes;
        }
    }
    return choice->curve->points[TARGETS - 1].reached < targets[TARGETS - 1];
}

static int curve_measure(struct run *run, struct grid *grid, struct pool *pool,
                         struct walk_curve *curve, struct error *err)
{
    struct choice choice = {.curve = curve};
    struct walk_curve more = {0};
    bool missed = true;
    double codes;

    if (effort_measure(run, 0, grid, pool, curve, &codes, err) < 0)
        return -1;
    for (uint32_t t = 0; t < TARGETS; t++)
        choice.codes[t] = codes;
    for (uint32_t effort = 1; effort < EFFORTS && (missed || effort < EFFORTS_MIN); effort++) {
        if (effort_measure(run, effort, grid, pool, &more, &codes, err) < 0)
            return -1;
        missed = effort_merge(run, &choice, &more, codes);
    }
    return 0;
}

/* Numbers of resident pages to measure at, ascending; *main_share is the one it will be served at.
 * `base`: the index that holds none. */
static uint32_t shares_choose(const struct disk_index *base, uint64_t serve_memory_bytes,
                              uint64_t memory_bytes_max, uint64_t pages[SHARES_MAX],
                              uint32_t *main_share)
{
    uint64_t all = base->format.page_count, page_bytes = base->format.page_bytes;
    /* What is served holds the calibration as well. */
    uint64_t serve_needs = base->memory_bytes + (base->calibration ? 0 : sizeof *base->calibration);
    uint64_t served =
        serve_memory_bytes > serve_needs ? (serve_memory_bytes - serve_needs) / page_bytes : 0;
    uint64_t wanted[SHARES_MAX] = {0, served < all ? served : all, all / 2, all};
    uint32_t count = 0;

    *main_share = 0;
    if (wanted[1] > wanted[2]) {
        wanted[1] = all / 2;
        wanted[2] = served < all ? served : all;
    }
    for (uint32_t i = 0; i < SHARES_MAX; i++) {
        if (i > 0 && memory_bytes_max &&
            base->memory_bytes + wanted[i] * page_bytes > memory_bytes_max)
            continue;
        if (i > 0 && wanted[i] * SHARE_LEAST < all)
            continue; /* too little to tell */
        /* As floats, since that is how curves tell them apart. */
        if (count && (float)((double)wanted[i] / (double)all) <=
                         (float)((double)pages[count - 1] / (double)all))
            continue;
        if (wanted[i] <= served)
            *main_share = count;
        pages[count++] = wanted[i];
    }
    return count;
}

static uint32_t queries_at(const struct calibrate_queries *queries, bool is_main, uint32_t k_index)
{
    uint32_t most = is_main ? queries_main[k_index] : queries_other[k_index];

    return queries->count < most ? queries->count : most;
}

int calibrate_field(const struct segment *segment, uint32_t field,
                    const struct calibrate_queries *queries, uint64_t serve_memory_bytes,
                    uint64_t memory_bytes_max, struct pool *pool, struct job *job,
                    struct walk_calibration *out, struct error *err)
{
    struct disk_index *index = NULL;
    struct grid *grid = calloc(1, sizeof *grid);
    struct run run = {.queries = queries, .job = job};
    uint32_t workers = pool ? pool_workers(pool) : 1, ks = 0, share_count, main_share;
    uint64_t pages[SHARES_MAX], base_bytes, page_bytes, walks = 0;
    int rc = -1;

    memset(out, 0, sizeof *out);
    while (ks < KS && calibrated_k[ks] <= queries->truth_k)
        ks++;
    if (queries->count == 0 || ks == 0) {
        error_set(err, ERR_INVALID, "a calibration wants queries and their nearest rows");
        goto done;
    }
    run.crews = calloc(workers, sizeof *run.crews);
    if (!grid || !run.crews) {
        error_set(err, ERR_NOMEM, "no memory for a calibration");
        goto done;
    }
    if (disk_index_open(segment, field, 0, &index, err) < 0)
        goto done;
    base_bytes = index->memory_bytes;
    page_bytes = index->format.page_bytes;
    share_count = shares_choose(index, serve_memory_bytes, memory_bytes_max, pages, &main_share);
    run.limits =
        (struct disk_search_limits){.search_list_max = 2 * efforts[EFFORTS - 1].search_list,
                                    .cells_max = 2 * efforts[EFFORTS - 1].cells,
                                    .k_max = calibrated_k[ks - 1],
                                    .beam_width = 1};
    disk_search_limits_raise(&run.limits, index);
    for (uint32_t s = 0; s < share_count; s++)
        for (uint32_t i = 0; i < ks; i++)
            walks += (uint64_t)queries_at(queries, s == main_share, i) * EFFORTS;
    job_phase(job, "calibrate", walks);
    for (uint32_t s = 0; s < share_count; s++) {
        if (s > 0) { /* one at a time in memory, and no pages of the one before */
            cache_release(&run.cache);
            disk_index_close(index);
            index = NULL;
            if (disk_index_open(segment, field, base_bytes + pages[s] * page_bytes, &index, err) <
                0)
                goto done;
        }
        run.index = index;
        cache_make(&run.cache, &run, workers, memory_bytes_max);
        for (uint32_t i = 0; i < ks; i++) {
            run.k = calibrated_k[i];
            run.count = queries_at(queries, s == main_share, i);
            if (curve_measure(&run, grid, pool, &out->curves[i * share_count + s], err) < 0)
                goto done;
        }
    }
    out->query_count = queries->count;
    out->own_queries = queries->hidden == NULL;
    out->curve_count = ks * share_count;
    rc = 0;
done:
    for (uint32_t w = 0; run.crews && w < workers; w++)
        crew_release(&run.crews[w]);
    free(run.crews);
    cache_release(&run.cache);
    free(grid);
    disk_index_close(index);
    return rc;
}
