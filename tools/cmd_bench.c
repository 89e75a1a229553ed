/* annd bench: recall, speed, reads and memory of an index, one record per setting. */
#include <inttypes.h>
#include <math.h>
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

#define LISTS_MAX 64u

struct record {
    uint32_t search_list;
    double recall, recall_p5, qps;
    double latency_mean, latency_p50, latency_p99;
    double reads, read_bytes, rounds, resident_hits, estimates, exact, cpu_us;
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

static int compare_f64(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;

    return (x > y) - (x < y);
}

/* A returned id is a hit when the truth lists it with a distance not above the k-th's. */
static uint32_t hits_of(const struct truth *truth, uint32_t query, uint32_t k, bool larger_better,
                        const struct search_task *task)
{
    const uint32_t *ids = truth->ids + (uint64_t)query * truth->k;
    const float *distances = truth->distances + (uint64_t)query * truth->k;
    uint32_t hits = 0;

    for (uint32_t h = 0; h < task->hit_count; h++)
        for (uint32_t t = 0; t < truth->k; t++)
            if ((int64_t)ids[t] == task->hits[h].key) {
                hits += larger_better ? distances[t] >= distances[k - 1]
                                      : distances[t] <= distances[k - 1];
                break;
            }
    return hits < k ? hits : k;
}

static int measure(struct search_engine *engine, const struct disk_index *index,
                   const struct queries *queries, const struct truth *truth, uint32_t k,
                   uint32_t search_list, uint32_t repeat, struct search_task *tasks,
                   struct search_hit *hits, double *values, struct record *r, struct error *err)
{
    uint32_t n = queries->count * repeat;
    bool larger_better = index->metric == METRIC_IP;

    *r = (struct record){.search_list = search_list};
    for (uint32_t i = 0; i < n; i++)
        tasks[i] = (struct search_task){.index = index,
                                        .query = queries->vectors +
                                                 (uint64_t)(i % queries->count) * queries->dim,
                                        .params = {.k = k, .search_list = search_list},
                                        .hits = hits + (uint64_t)i * k};

    double cpu = cpu_seconds(), start = now_seconds();

    if (search_engine_run(engine, tasks, n, err) < 0)
        return -1;
    double seconds = now_seconds() - start;

    r->cpu_us = (cpu_seconds() - cpu) * 1e6 / n;
    r->qps = n / seconds;
    for (uint32_t i = 0; i < n; i++) {
        if (tasks[i].error.code) {
            *err = tasks[i].error;
            return -1;
        }
        r->reads += tasks[i].stats.reads;
        r->read_bytes += (double)tasks[i].stats.read_bytes;
        r->rounds += tasks[i].stats.rounds;
        r->resident_hits += tasks[i].stats.resident_hits;
        r->estimates += tasks[i].stats.estimates;
        r->exact += tasks[i].stats.exact;
        r->latency_mean += tasks[i].stats.latency_us;
        values[i] = tasks[i].stats.latency_us;
    }
    qsort(values, n, sizeof *values, compare_f64);
    r->latency_p50 = values[n / 2];
    r->latency_p99 = values[(uint64_t)n * 99 / 100];
    r->reads /= n;
    r->read_bytes /= n;
    r->rounds /= n;
    r->resident_hits /= n;
    r->estimates /= n;
    r->exact /= n;
    r->latency_mean /= n;
    for (uint32_t q = 0; q < queries->count; q++) {
        values[q] = (double)hits_of(truth, q, k, larger_better, &tasks[q]) / k;
        r->recall += values[q];
    }
    r->recall /= queries->count;
    qsort(values, queries->count, sizeof *values, compare_f64);
    r->recall_p5 = values[queries->count / 20];
    return 0;
}

static void print_record(const struct record *r, const struct index_directory *directory,
                         const struct disk_index *index, uint32_t k, uint32_t threads,
                         uint32_t inflight, uint32_t beam, const char *io, bool jsonl, bool first)
{
    const char *store = store_name(index->format.store);

    if (jsonl) {
        printf("{\"search_list\":%u,\"k\":%u,\"recall\":%.5f,\"recall_p5\":%.3f,\"qps\":%.1f,"
               "\"latency_us_mean\":%.1f,\"latency_us_p50\":%.1f,\"latency_us_p99\":%.1f,"
               "\"reads_mean\":%.3f,\"read_bytes_mean\":%.1f,\"rounds_mean\":%.3f,"
               "\"cpu_us_mean\":%.1f,\"index_memory_bytes\":%" PRIu64 ",\"memory_bytes\":%" PRIu64
               ",\"store\":\"%s\",\"resident_hits_mean\":%.3f,\"estimates_mean\":%.1f,"
               "\"exact_mean\":%.1f,\"threads\":%u,\"inflight\":%u,\"beam_width\":%u,"
               "\"io\":\"%s\",\"kernels\":\"%s\",\"rows\":%" PRIu64 "}\n",
               r->search_list, k, r->recall, r->recall_p5, r->qps, r->latency_mean, r->latency_p50,
               r->latency_p99, r->reads, r->read_bytes, r->rounds, r->cpu_us,
               directory->memory_bytes, peak_bytes(), store, r->resident_hits, r->estimates,
               r->exact, threads, inflight, beam, io, index->kernels->name, directory->row_count);
        fflush(stdout);
        return;
    }
    if (first)
        printf("%" PRIu64 " rows of %u dimensions, %s, stored as %s; recall@%u; %u threads, %u in "
               "flight, beam %u, %s\n"
               "search_list  recall   qps      latency us: mean    p50      p99   reads  rounds  "
               "cpu us  index MiB  peak MiB\n",
               directory->row_count, index->dim, metric_name(index->metric), store, k, threads,
               inflight, beam, io);
    printf("%11u  %.4f  %7.0f  %16.0f %7.0f %8.0f  %6.1f  %6.1f  %6.0f  %9.1f  %8.1f\n",
           r->search_list, r->recall, r->qps, r->latency_mean, r->latency_p50, r->latency_p99,
           r->reads, r->rounds, r->cpu_us, (double)directory->memory_bytes / (1 << 20),
           (double)peak_bytes() / (1 << 20));
    fflush(stdout);
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *query_path = option_text(arguments, "queries");
    const char *truth_path = option_text(arguments, "truth");
    uint32_t lists[LISTS_MAX], list_count = LISTS_MAX, list_max = 0;
    uint32_t k = option_u32(arguments, "k"), beam = option_u32(arguments, "beam-width");
    uint32_t threads = option_u32(arguments, "threads");
    uint32_t inflight = option_u32(arguments, "inflight");
    uint32_t repeat = option_u32(arguments, "repeat");
    bool jsonl = !strcmp(option_text(arguments, "output"), "jsonl");
    struct index_directory *directory = NULL;
    struct search_engine *engine = NULL;
    struct queries queries = {0};
    struct truth truth = {0};
    struct search_task *tasks = NULL;
    struct search_hit *hits = NULL;
    double *values = NULL;
    enum reader_backend backend;
    char reason[256];
    int rc = -1;

    if (!query_path || !truth_path) {
        fprintf(stderr, "annd: annd bench needs --queries and --truth\n");
        return EXIT_USAGE;
    }
    if (option_list(arguments, "search-list", 1, SEARCH_LIST_MAX, lists, &list_count, err) < 0) {
        fprintf(stderr, "annd: %s\n", err->message);
        return EXIT_USAGE;
    }
    reader_probe(reason);
    if (reader_backend_parse(option_text(arguments, "io"), &backend, err) < 0 ||
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
    if (truth.query_count != queries.count || truth.k < k) {
        error_set(err, ERR_INVALID,
                  "%s has %u queries and k %u, wanted %u queries and k %u or more", truth_path,
                  truth.query_count, truth.k, queries.count, k);
        goto done;
    }
    for (uint32_t i = 0; i < list_count; i++)
        list_max = lists[i] > list_max ? lists[i] : list_max;
    list_max = list_max < k ? k : list_max;
    if (!threads)
        threads = cpu_count();
    threads = threads > inflight ? inflight : threads;

    struct search_engine_options options = queries_engine_options(
        index, threads, (inflight + threads - 1) / threads, beam, list_max, k, backend);
    uint64_t n = (uint64_t)queries.count * repeat;

    if (n > 4000000) {
        error_set(err, ERR_INVALID, "%u queries times --repeat %u are more than 4,000,000 searches",
                  queries.count, repeat);
        goto done;
    }
    tasks = malloc(n * sizeof *tasks);
    hits = malloc(n * k * sizeof *hits);
    values = malloc((n > queries.count ? n : queries.count) * sizeof *values);
    if (!tasks || !hits || !values) {
        error_set(err, ERR_NOMEM, "no memory for %llu searches", (unsigned long long)n);
        goto done;
    }
    if (search_engine_open(&options, &engine, err) < 0)
        goto done;
    for (uint32_t i = 0; i < list_count; i++) {
        struct record record;

        if (measure(engine, index, &queries, &truth, k, lists[i], repeat, tasks, hits, values,
                    &record, err) < 0)
            goto done;
        print_record(&record, directory, index, k, threads, inflight, beam,
                     reader_backend_name(search_engine_backend(engine)), jsonl, i == 0);
    }
    rc = 0;
done:
    search_engine_close(engine);
    index_directory_close(directory);
    queries_release(&queries);
    truth_release(&truth);
    free(tasks);
    free(hits);
    free(values);
    return rc;
}

static const struct option options[] = {
    {"queries", OPTION_TEXT, "FILE", NULL, NULL, "query vectors", 0, 0},
    {"truth", OPTION_TEXT, "FILE", NULL, NULL, "their exact neighbours (annd truth)", 0, 0},
    {"k", OPTION_NUMBER, "N", "10", NULL, "neighbours per query", 1, SEARCH_LIST_MAX},
    {"search-list", OPTION_TEXT, "N,N,...", "16,24,32,48,64,100,150,200", NULL,
     "candidates kept, one record each", 0, 0},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "search threads, by default all cores", 1, 256},
    {"inflight", OPTION_NUMBER, "N", "32", NULL, "queries in flight at once", 1, 4096},
    {"beam-width", OPTION_NUMBER, "W", "2", NULL, "reads in flight per query", 1,
     DISK_SEARCH_BEAM_MAX},
    {"index-memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of all that stays resident, by default what must be", 0, 0},
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
                "--output jsonl\n",
    .options = options,
    .run = run,
};
