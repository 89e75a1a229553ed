/* annd truth: exact nearest neighbours of a query file, the yardstick of recall. */
#include <stdio.h>

#include "index/flat.h"
#include "tools/commands.h"
#include "tools/progress.h"
#include "tools/queries.h"

static int run(const struct arguments *arguments, struct error *err)
{
    const char *query_path = option_text(arguments, "queries");
    const char *output = option_text(arguments, "output");
    uint32_t k = option_u32(arguments, "k");
    struct vector_source *base = NULL;
    struct queries queries = {0};
    struct truth truth = {0};
    struct pool *pool = NULL;
    struct job *job = NULL;
    enum metric metric;
    int rc = -1;

    if (!query_path || !output) {
        fprintf(stderr, "annd: annd truth needs --queries and --output\n");
        return EXIT_USAGE;
    }
    if (metric_parse(option_text(arguments, "metric"), &metric, err) < 0 ||
        vector_source_open(vfs_posix(), arguments->positional[0], &base, err) < 0 ||
        queries_read(query_path, vector_source_dim(base), &queries, err) < 0 ||
        pool_new(option_u32(arguments, "threads"), &pool, err) < 0)
        goto done;
    job = progress_job(arguments, err);
    if (!job)
        goto done;
    if (flat_truth(base, queries.vectors, queries.count, k, metric, pool, job, &truth, err) < 0 ||
        truth_file_write(vfs_posix(), output, &truth, err) < 0)
        goto done;
    printf("%s: %u nearest of %llu rows by %s for %u queries\n", output, k,
           (unsigned long long)vector_source_rows(base), metric_name(metric), queries.count);
    rc = 0;
done:
    progress_end(job);
    truth_release(&truth);
    queries_release(&queries);
    vector_source_close(base);
    pool_free(pool);
    return rc;
}

static const struct option options[] = {
    {"queries", OPTION_TEXT, "FILE", NULL, NULL, "query vectors", 0, 0},
    {"k", OPTION_NUMBER, "N", "100", NULL, "neighbours per query", 1, 16384},
    {"metric", OPTION_TEXT, "METRIC", "l2", "l2|ip|cosine", "distance", 0, 0},
    {"output", OPTION_TEXT, "FILE", NULL, NULL, "truth file to write", 0, 0},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "worker threads, by default all cores", 1, 1024},
    PROGRESS_OPTION,
    {0},
};

const struct command command_truth = {
    .name = "truth",
    .positional = "INPUT",
    .summary = "find the exact nearest neighbours of queries",
    .examples = "  annd truth base.u8bin --queries q.u8bin -k 100 --output truth.bin\n"
                "  annd truth base.fbin --queries q.fbin --metric cosine --output truth.bin\n",
    .options = options,
    .run = run,
};
