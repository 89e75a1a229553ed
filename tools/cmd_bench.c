/* annd bench: recall, speed, reads and memory of an index, one record per setting.
 *
 * So many queries as --inflight says are kept going: each that is answered is followed at once by
 * the next of the file, from the engine's own thread, until all have been asked --repeat times.
 * There is a task for every query in flight and no other, latencies are counted in a histogram, and
 * recall is compared the first time a query is asked; so memory does not grow with --repeat. */
#include <inttypes.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#include "index/index_directory.h"
#include "index/search_engine.h"
#include "index/truth_file.h"
#include "storage/base/pool.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/queries.h"

/* Latencies in ns: to 1 in 128, from 0 to 2^40 (18 minutes). */
#define SUB_BITS 7u
#define SUB_COUNT (1u << SUB_BITS)
#define BUCKETS ((41u - SUB_BITS) * SUB_COUNT)
#define ENGINE_SLOTS_MAX 64u

struct setting {
    struct search_target target;
    struct walk_rule rule;
    float reads_expected; /* 0: not known */
    bool exact_scores;
};

struct record {
    double recall, recall_p5, qps;
    double latency_mean, latency_p50, latency_p99;
    double reads, read_bytes, rounds, resident_hits, cells, scanned, estimates, exact, cpu_us;
};

/* What the records of one run have in common. */
struct conditions {
    const struct index_directory *directory;
    const struct disk_index *index;
    uint32_t k, threads, inflight, beam_width, reads_in_flight;
    const char *io;
    bool jsonl;
};

struct load;

/* One query in flight, and the sums over all it has been. */
struct client {
    struct search_task task;
    struct load *load;
    uint64_t turn; /* counts all queries of the run */
    struct record sum;
};

struct load {
    struct search_engine *engine;
    const struct disk_index *index;
    const struct queries *queries;
    const struct truth *truth;
    uint32_t k;
    bool early_reads;
    uint64_t total;
    uint64_t next;               /* turn; atomic */
    uint64_t histogram[BUCKETS]; /* atomic */
    float *recalls;              /* of each query */
    struct client *clients;
    struct search_hit *hits; /* clients x k */
    uint32_t client_count;
    pthread_mutex_t mutex; /* guards the rest */
    pthread_cond_t done;
    uint32_t running;
    struct error error;
};

static double now_seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static double cpu_seconds(void)
{
    struct rusage usage;

    getrusage(RUSAGE_SELF, &usage);
    return (double)usage.ru_utime.tv_sec + (double)usage.ru_stime.tv_sec +
           ((double)usage.ru_utime.tv_usec + (double)usage.ru_stime.tv_usec) / 1e6;
}

/* Peak resident set of this program since it started, as the kernel counts it. Not getrusage's
 * ru_maxrss, which outlives exec and so would count the shell or script that started us. */
static uint64_t peak_bytes(void)
{
    unsigned long long kib = 0;
    char line[128];
    FILE *status = fopen("/proc/self/status", "re");

    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "VmHWM: %llu kB", &kib) == 1)
            break;
    if (status)
        fclose(status);
    return kib * 1024;
}

static int compare_f32(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;

    return (x > y) - (x < y);
}

/* ---- latencies ---- */

static uint32_t bucket_of(uint64_t ns)
{
    if (ns < SUB_COUNT)
        return (uint32_t)ns;
    uint32_t shift = 63 - (uint32_t)__builtin_clzll(ns) - SUB_BITS;
    uint32_t bucket = (shift << SUB_BITS) + (uint32_t)(ns >> shift);

    return bucket < BUCKETS ? bucket : BUCKETS - 1;
}

/* The middle of a bucket, in us. */
static double bucket_us(uint32_t bucket)
{
    if (bucket < SUB_COUNT)
        return bucket / 1e3;
    uint32_t shift = (bucket >> SUB_BITS) - 1;
    uint64_t least = (uint64_t)(SUB_COUNT + (bucket & (SUB_COUNT - 1))) << shift;

    return ((double)least + (double)(1ull << shift) / 2) / 1e3;
}

/* The latency that `rank` others are below. */
static double latency_at(const struct load *load, uint64_t rank)
{
    uint64_t seen = 0;
    uint32_t bucket = 0;

    for (; bucket < BUCKETS - 1; bucket++) {
        seen += load->histogram[bucket];
        if (seen > rank)
            break;
    }
    return bucket_us(bucket);
}

/* ---- the load ---- */

/* A returned id is a hit when the truth lists it with a distance not above the k-th's. */
static uint32_t hits_of(const struct load *load, uint32_t query, const struct search_task *task)
{
    const struct truth *truth = load->truth;
    const uint32_t *ids = truth->ids + (uint64_t)query * truth->k;
    const float *distances = truth->distances + (uint64_t)query * truth->k;
    bool larger_better = load->index->metric == METRIC_IP;
    uint32_t k = load->k, hits = 0;

    for (uint32_t h = 0; h < task->hit_count; h++)
        for (uint32_t t = 0; t < truth->k; t++)
            if ((int64_t)ids[t] == task->hits[h].key) {
                hits += larger_better ? distances[t] >= distances[k - 1]
                                      : distances[t] <= distances[k - 1];
                break;
            }
    return hits < k ? hits : k;
}

static void account(struct client *client)
{
    struct load *load = client->load;
    const struct search_stats *stats = &client->task.stats;
    struct record *sum = &client->sum;

    sum->reads += stats->reads;
    sum->read_bytes += (double)stats->read_bytes;
    sum->rounds += stats->rounds;
    sum->resident_hits += stats->resident_hits;
    sum->cells += stats->cells;
    sum->scanned += stats->scanned;
    sum->estimates += stats->estimates;
    sum->exact += stats->exact;
    sum->latency_mean += (double)stats->latency_us;
    __atomic_fetch_add(&load->histogram[bucket_of((uint64_t)((double)stats->latency_us * 1e3))], 1,
                       __ATOMIC_RELAXED);
    if (client->turn < load->queries->count)
        load->recalls[client->turn] =
            (float)hits_of(load, (uint32_t)client->turn, &client->task) / (float)load->k;
}

static void client_end(struct load *load, const struct error *error)
{
    pthread_mutex_lock(&load->mutex);
    if (error->code && !load->error.code) {
        load->error = *error;
        __atomic_store_n(&load->next, load->total, __ATOMIC_RELAXED); /* the others end, too */
    }
    if (--load->running == 0)
        pthread_cond_signal(&load->done);
    pthread_mutex_unlock(&load->mutex);
}

static void client_next(struct client *client)
{
    struct load *load = client->load;
    struct error err = ERROR_INIT;

    client->turn = __atomic_fetch_add(&load->next, 1, __ATOMIC_RELAXED);
    if (client->turn < load->total) {
        client->task.query = load->queries->vectors +
                             client->turn % load->queries->count * (uint64_t)load->queries->dim;
        if (search_engine_submit(load->engine, &client->task, &err) == 0)
            return;
    }
    client_end(load, &err);
}

static void client_done(struct search_task *task)
{
    struct client *client = task->context;

    if (task->error.code) {
        client_end(client->load, &task->error);
        return;
    }
    account(client);
    client_next(client);
}

static int load_init(struct load *load, uint32_t inflight, struct error *err)
{
    pthread_mutex_init(&load->mutex, NULL);
    pthread_cond_init(&load->done, NULL);
    load->client_count = load->total < inflight ? (uint32_t)load->total : inflight;
    load->clients = calloc(load->client_count, sizeof *load->clients);
    load->hits = malloc((uint64_t)load->client_count * load->k * sizeof *load->hits);
    load->recalls = malloc(load->queries->count * sizeof *load->recalls);
    if (!load->clients || !load->hits || !load->recalls)
        return error_set(err, ERR_NOMEM, "no memory for %u searches in flight", load->client_count);
    return 0;
}

static void load_release(struct load *load)
{
    pthread_mutex_destroy(&load->mutex);
    pthread_cond_destroy(&load->done);
    free(load->clients);
    free(load->hits);
    free(load->recalls);
}

static void sum_up(struct load *load, struct record *r)
{
    uint32_t queries = load->queries->count;
    double n = (double)load->total;

    for (uint32_t i = 0; i < load->client_count; i++) {
        const struct record *sum = &load->clients[i].sum;

        r->reads += sum->reads / n;
        r->read_bytes += sum->read_bytes / n;
        r->rounds += sum->rounds / n;
        r->resident_hits += sum->resident_hits / n;
        r->cells += sum->cells / n;
        r->scanned += sum->scanned / n;
        r->estimates += sum->estimates / n;
        r->exact += sum->exact / n;
        r->latency_mean += sum->latency_mean / n;
    }
    r->latency_p50 = latency_at(load, load->total / 2);
    r->latency_p99 = latency_at(load, load->total / 100 * 99 + load->total % 100 * 99 / 100);
    for (uint32_t q = 0; q < queries; q++)
        r->recall += (double)load->recalls[q] / queries;
    qsort(load->recalls, queries, sizeof *load->recalls, compare_f32);
    r->recall_p5 = (double)load->recalls[queries / 20];
}

static int measure(struct load *load, const struct setting *setting, struct record *r,
                   struct error *err)
{
    *r = (struct record){0};
    memset(load->histogram, 0, sizeof load->histogram);
    load->next = 0;
    load->running = load->client_count;
    error_clear(&load->error);
    for (uint32_t i = 0; i < load->client_count; i++)
        load->clients[i] =
            (struct client){.task = {.index = load->index,
                                     .params = {.k = load->k,
                                                .rule = setting->rule,
                                                .early_reads = load->early_reads,
                                                .exact_scores = setting->exact_scores},
                                     .hits = load->hits + (uint64_t)i * load->k,
                                     .done = client_done,
                                     .context = &load->clients[i]},
                            .load = load};

    double cpu = cpu_seconds(), start = now_seconds();

    for (uint32_t i = 0; i < load->client_count; i++)
        client_next(&load->clients[i]);
    pthread_mutex_lock(&load->mutex);
    while (load->running)
        pthread_cond_wait(&load->done, &load->mutex);
    pthread_mutex_unlock(&load->mutex);
    if (load->error.code) {
        *err = load->error;
        return -1;
    }
    r->qps = (double)load->total / (now_seconds() - start);
    r->cpu_us = (cpu_seconds() - cpu) * 1e6 / (double)load->total;
    sum_up(load, r);
    return 0;
}

/* ---- records ---- */

static void print_jsonl(const struct record *r, const struct setting *setting,
                        const struct conditions *c)
{
    const struct walk_rule *rule = &setting->rule;
    char target[32] = "null", expected[32] = "null";

    if (setting->target.recall > 0)
        snprintf(target, sizeof target, "%.6g", setting->target.recall);
    if (setting->reads_expected > 0)
        snprintf(expected, sizeof expected, "%.2f", (double)setting->reads_expected);
    printf("{\"recall_target\":%s,\"search_list\":%u,\"cells\":%u,\"patience\":%u,\"gain\":%.6g,"
           "\"k\":%u,\"recall\":%.5f,\"recall_p5\":%.3f,\"qps\":%.1f,"
           "\"latency_us_mean\":%.1f,\"latency_us_p50\":%.1f,\"latency_us_p99\":%.1f,"
           "\"reads_mean\":%.3f,\"reads_expected\":%s,\"read_bytes_mean\":%.1f,"
           "\"rounds_mean\":%.3f,\"resident_hits_mean\":%.3f,\"cells_scanned_mean\":%.1f,"
           "\"scanned_mean\":%.1f,\"estimates_mean\":%.1f,\"exact_mean\":%.1f,"
           "\"cpu_us_mean\":%.1f,",
           target, rule->search_list, rule->cells, rule->patience, (double)rule->gain, c->k,
           r->recall, r->recall_p5, r->qps, r->latency_mean, r->latency_p50, r->latency_p99,
           r->reads, expected, r->read_bytes, r->rounds, r->resident_hits, r->cells, r->scanned,
           r->estimates, r->exact, r->cpu_us);
    printf("\"index_memory_bytes\":%" PRIu64 ",\"memory_bytes\":%" PRIu64
           ",\"resident_share\":%.5f,\"store\":\"%s\",\"exact_scores\":%s,\"threads\":%u,"
           "\"inflight\":%u,\"beam_width\":%u,\"reads_in_flight\":%u,\"io\":\"%s\","
           "\"isa\":\"%s\",\"kernels\":\"%s\",\"rows\":%" PRIu64 "}\n",
           c->directory->memory_bytes, peak_bytes(), disk_index_resident_share(c->index),
           store_name(c->index->format.store), setting->exact_scores ? "true" : "false", c->threads,
           c->inflight, c->beam_width, c->reads_in_flight, c->io, c->index->kernels->name,
           c->index->kernels->name, c->directory->row_count);
}

static void print_record(const struct record *r, const struct setting *setting,
                         const struct conditions *c, bool first)
{
    const struct disk_index *index = c->index;
    char target[16] = "-";

    if (c->jsonl) {
        print_jsonl(r, setting, c);
        fflush(stdout);
        return;
    }
    if (first)
        printf("%" PRIu64 " rows of %u dimensions, %s, stored as %s%s; recall@%u; index %.1f MiB "
               "with %.1f %% of the pages; %u threads, %u in flight, beam %u, %u reads at once, "
               "%s\n"
               "target   list cells   s     tau  recall    5 %%     qps  latency us: mean     p50"
               "      p99   reads  rounds  resident  cpu us  peak MiB\n",
               c->directory->row_count, index->dim, metric_name(index->metric),
               store_name(index->format.store),
               setting->exact_scores ? ", scored from the originals" : "", c->k,
               (double)c->directory->memory_bytes / (1 << 20),
               100 * disk_index_resident_share(index), c->threads, c->inflight, c->beam_width,
               c->reads_in_flight, c->io);
    if (setting->target.recall > 0)
        snprintf(target, sizeof target, "%.4g", setting->target.recall);
    printf("%6s  %5u %5u %3u %7.3g  %.4f %6.2f %7.0f  %16.0f %7.0f %8.0f  %6.1f  %6.1f  %8.1f  "
           "%6.0f  %8.1f\n",
           target, setting->rule.search_list, setting->rule.cells, setting->rule.patience,
           (double)setting->rule.gain, r->recall, r->recall_p5, r->qps, r->latency_mean,
           r->latency_p50, r->latency_p99, r->reads, r->rounds, r->resident_hits, r->cpu_us,
           (double)peak_bytes() / (1 << 20));
    fflush(stdout);
}

/* ---- the settings ---- */

/* What is measured when the user does not say: targets where there is a calibration to go by. */
static uint32_t targets_default(const struct disk_index *index, struct search_target *out)
{
    static const double recalls[] = {0.9, 0.95, 0.99};
    static const uint32_t lists[] = {16, 24, 32, 48, 64, 100, 150, 200};
    uint32_t count = 0;

    if (index->calibration && index->calibration->curve_count)
        for (; count < sizeof recalls / sizeof *recalls; count++)
            out[count] = (struct search_target){.recall = recalls[count]};
    else
        for (; count < sizeof lists / sizeof *lists; count++)
            out[count] = (struct search_target){.search_list = lists[count]};
    return count;
}

static struct setting setting_of(const struct arguments *arguments,
                                 const struct search_target *target, const struct disk_index *index,
                                 uint32_t k)
{
    struct setting setting = {.target = *target,
                              .exact_scores = option_flag(arguments, "exact-scores")};
    struct walk_rule *rule = &setting.rule;

    *rule = search_target_rule(target, index, k, &setting.reads_expected);
    if (option_given(arguments, "cells"))
        rule->cells = option_u32(arguments, "cells");
    if (option_given(arguments, "patience"))
        rule->patience = option_u32(arguments, "patience");
    if (option_given(arguments, "gain"))
        rule->gain = (float)option_real(arguments, "gain");
    if (option_given(arguments, "cells") || option_given(arguments, "patience") ||
        option_given(arguments, "gain"))
        setting.reads_expected = 0;
    return setting;
}

static int usage(const struct error *err)
{
    fprintf(stderr, "annd: %s\n", err->message);
    return EXIT_USAGE;
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *query_path = option_text(arguments, "queries");
    const char *truth_path = option_text(arguments, "truth");
    bool latency = !strcmp(option_text(arguments, "prefer"), "latency");
    struct search_target targets[SEARCH_TARGETS_MAX];
    struct setting settings[SEARCH_TARGETS_MAX];
    uint32_t count = SEARCH_TARGETS_MAX;
    struct conditions c = {.k = option_u32(arguments, "k"),
                           .threads = option_u32(arguments, "threads"),
                           .inflight = option_u32(arguments, "inflight"),
                           .beam_width = option_u32(arguments, "beam-width"),
                           .reads_in_flight = option_u32(arguments, "reads-in-flight"),
                           .jsonl = !strcmp(option_text(arguments, "output"), "jsonl")};
    struct search_engine_options options = {0};
    struct index_directory *directory = NULL;
    struct queries queries = {0};
    struct truth truth = {0};
    struct load *load = NULL;
    char reason[256];
    int rc = -1;

    if (!query_path || !truth_path) {
        error_set(err, ERR_INVALID, "annd bench needs --queries and --truth");
        return usage(err);
    }
    if (search_targets_parse(arguments, targets, &count, err) < 0)
        return usage(err);
    if (option_given(arguments, "gain") && !(option_real(arguments, "gain") >= 0)) {
        error_set(err, ERR_INVALID, "--gain takes a number of expected hits, 0 or more, not %s",
                  option_text(arguments, "gain"));
        return usage(err);
    }
    reader_probe(reason);
    if (reader_backend_parse(option_text(arguments, "io"), &options.backend, err) < 0 ||
        index_directory_open(vfs_posix(), arguments->positional[0],
                             option_u64(arguments, "index-memory"), false, &directory, err) < 0)
        goto done;
    if (directory->segment_count != 1) {
        error_set(err, ERR_UNSUPPORTED, "%s has %u segments; annd bench measures one",
                  arguments->positional[0], directory->segment_count);
        goto done;
    }
    const struct disk_index *index = directory->segments[0].fields[0];

    if (!index->format.holds_keys) {
        error_set(err, ERR_UNSUPPORTED,
                  "%s has text keys; the truth's row numbers cannot be compared with them",
                  arguments->positional[0]);
        goto done;
    }
    if (queries_read(query_path, index->dim, &queries, err) < 0 ||
        truth_file_read(vfs_posix(), truth_path, index->row_count, &truth, err) < 0)
        goto done;
    if (truth.query_count != queries.count || truth.k < c.k) {
        error_set(err, ERR_INVALID,
                  "%s has %u queries and k %u, wanted %u queries and k %u or more", truth_path,
                  truth.query_count, truth.k, queries.count, c.k);
        goto done;
    }
    if (!count)
        count = targets_default(index, targets);
    c.directory = directory;
    c.index = index;
    if (!c.threads)
        c.threads = cpu_count();
    c.threads = c.threads > c.inflight ? c.inflight : c.threads;
    if (!c.beam_width)
        c.beam_width = latency ? 4 : 2;
    if (!c.reads_in_flight)
        c.reads_in_flight = latency ? 32 : 128;
    options.threads = c.threads;
    options.slots_per_thread = (c.inflight + c.threads - 1) / c.threads;
    if (options.slots_per_thread > ENGINE_SLOTS_MAX)
        options.slots_per_thread = ENGINE_SLOTS_MAX;
    options.reads_in_flight = c.reads_in_flight;
    options.limits.beam_width = c.beam_width;
    options.limits.k_max = c.k;
    for (uint32_t i = 0; i < count; i++) {
        settings[i] = setting_of(arguments, &targets[i], index, c.k);
        search_limits_raise(&options.limits, index, &settings[i].rule);
    }
    load = calloc(1, sizeof *load);
    if (!load) {
        error_set(err, ERR_NOMEM, "no memory for the measurement");
        goto done;
    }
    load->index = index;
    load->queries = &queries;
    load->truth = &truth;
    load->k = c.k;
    load->early_reads = latency;
    load->total = (uint64_t)queries.count * option_u32(arguments, "repeat");
    if (load_init(load, c.inflight, err) < 0 ||
        search_engine_open(&options, &load->engine, err) < 0)
        goto done;
    c.io = reader_backend_name(search_engine_backend(load->engine));
    for (uint32_t i = 0; i < count; i++) {
        struct record record;

        if (measure(load, &settings[i], &record, err) < 0)
            goto done;
        print_record(&record, &settings[i], &c, i == 0);
    }
    rc = 0;
done:
    if (load) {
        search_engine_close(load->engine);
        load_release(load);
    }
    free(load);
    index_directory_close(directory);
    queries_release(&queries);
    truth_release(&truth);
    return rc;
}

static const struct option options[] = {
    {"queries", OPTION_TEXT, "FILE", NULL, NULL, "query vectors", 0, 0},
    {"truth", OPTION_TEXT, "FILE", NULL, NULL, "their exact neighbours (annd truth)", 0, 0},
    {"k", OPTION_NUMBER, "N", "10", NULL, "neighbours per query", 1, SEARCH_LIST_MAX},
    {"recall", OPTION_TEXT, "R,R,...", NULL, NULL,
     "recalls to aim at, one record each; by default 0.9,0.95,0.99 of a calibrated index", 0, 0},
    {"search-list", OPTION_TEXT, "N,N,...", NULL, NULL,
     "in their place: candidates kept, all read, one record each; the default without calibration",
     0, 0},
    {"prefer", OPTION_TEXT, "WHAT", "throughput", "latency|throughput",
     "latency: 32 reads at once, beam 4, the first ones early; "
     "throughput: 128, beam 2",
     0, 0},
    {"reads-in-flight", OPTION_NUMBER, "N", NULL, NULL, "reads at once over all threads", 1,
     1u << 20},
    {"beam-width", OPTION_NUMBER, "W", NULL, NULL, "reads at once of one query", 1,
     DISK_SEARCH_BEAM_MAX},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "search threads, by default all cores", 1, 256},
    {"inflight", OPTION_NUMBER, "N", "32", NULL, "queries in flight at once", 1, 4096},
    {"index-memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of all that stays resident, by default what must be", 0, 0},
    {"exact-scores", OPTION_FLAG, NULL, NULL, NULL,
     "score the answers from the original vectors, for k more reads", 0, 0},
    {"cells", OPTION_NUMBER, "N", NULL, NULL, "instead of the rule's: cells scanned for seeds", 0,
     DISK_SEARCH_CELLS_MAX},
    {"patience", OPTION_NUMBER, "S", NULL, NULL,
     "instead of the rule's: reads in a row without a new hit before it may stop", 0, 1000000},
    {"gain", OPTION_REAL, "TAU", NULL, NULL,
     "instead of the rule's: it stops when fewer better rows are to be expected", 0, 0},
    {"repeat", OPTION_NUMBER, "N", "1", NULL, "run the queries so many times", 1, 1000},
    {"io", OPTION_TEXT, "HOW", "auto", "auto|uring|pread", "reader backend", 0, 0},
    {"output", OPTION_TEXT, "FORM", "table", "table|jsonl", "form of the records", 0, 0},
    {0},
};

const struct command command_bench = {
    .name = "bench",
    .positional = "DIR",
    .summary = "measure recall, speed, reads and memory of an index",
    .examples = "  annd bench idx --queries q.u8bin --truth gt.bin\n"
                "  annd bench idx --queries q.u8bin --truth gt.bin --search-list 16,32,64 "
                "--output jsonl\n"
                "  annd bench idx --queries q.u8bin --truth gt.bin --recall 0.95 --prefer latency "
                "--inflight 1\n",
    .options = options,
    .run = run,
};
