/* annd build: a vector file becomes an index directory.
 *
 * OUTPUT is made at once, with the record of what was asked; until its MANIFEST is there it is an
 * unfinished build, which annd resume goes on with and annd discard removes. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "storage/file.h"
#include "tools/build_record.h"
#include "tools/build_run.h"
#include "tools/commands.h"
#include "tools/progress.h"

/* What the files will take, for a refusal before the work rather than after it. */
static int space_check(const char *folder, const struct build_plan *plan, struct error *err)
{
    uint64_t free_bytes, needed = plan->index_bytes + plan->scratch_bytes;

    if (vfs_posix()->space(vfs_posix(), folder, &free_bytes) < 0 || free_bytes >= needed)
        return 0;
    error_set(err, ERR_BUDGET,
              "%s has %llu MiB free; the index will take about %llu MiB, and the build %llu MiB of "
              "scratch beside it",
              folder, (unsigned long long)free_bytes >> 20,
              (unsigned long long)plan->index_bytes >> 20,
              (unsigned long long)plan->scratch_bytes >> 20);
    error_remedy(err, "make room, or choose another --output");
    return -1;
}

/* Says what is in the way at the output's place. */
static int refuse_existing(const char *folder, struct error *err)
{
    struct journal *journal = NULL;
    struct error open_err = ERROR_INIT;

    if (!journal_exists(vfs_posix(), folder)) {
        error_set(err, ERR_EXISTS, "%s is there already", folder);
        error_remedy(err, "choose another --output, or remove it first");
        return -1;
    }
    if (journal_open(vfs_posix(), folder, &journal, &open_err) < 0 && open_err.code == ERR_BUSY)
        return error_set(err, ERR_BUSY, "%s is being built by another process", folder);
    journal_close(journal);
    error_set(err, ERR_EXISTS, "%s holds an unfinished build", folder);
    error_remedy(err, "annd resume %s goes on with it, annd discard %s removes it", folder, folder);
    return -1;
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *output = option_text(arguments, "output");
    struct build_run run = {.asked = arguments};
    struct manifest *record = NULL;
    char parent[FILE_PATH_MAX];
    int rc = -1;

    if (!output) {
        fprintf(stderr, "annd: annd build needs --output DIR\n");
        return EXIT_USAGE;
    }
    if (build_run_folder(&run, output, err) < 0)
        return -1;
    file_path_folder(parent, run.folder);
    if (!journal_may_create(vfs_posix(), run.folder))
        return refuse_existing(run.folder, err);
    /* Refusals that need no work come first. */
    if (build_run_prepare(&run, option_u32(arguments, "threads"), option_u64(arguments, "memory"),
                          err) < 0 ||
        space_check(parent, &run.plan, err) < 0 ||
        build_record_make(arguments, run.memory_bytes, &record, err) < 0)
        goto done;
    run.job = progress_job(arguments, err);
    if (!run.job || journal_create(vfs_posix(), run.folder, record, &run.journal, err) < 0)
        goto done;
    rc = build_run_work(&run, true, err);
done:
    manifest_free(record);
    build_run_release(&run);
    return rc;
}

static const struct option options[] = {
    {"output", OPTION_TEXT, "DIR", NULL, NULL, "index directory to make", 0, 0},
    {"metric", OPTION_TEXT, "METRIC", "l2", "l2|ip|cosine", "distance", 0, 0},
    {"keys", OPTION_TEXT, "FILE", NULL, NULL,
     "keys: text, one a line, or integer .npy; by default the row number", 0, 0},
    {"attributes", OPTION_TEXT, "FILE", NULL, NULL, "a JSON object a row", 0, 0},
    {"schema", OPTION_TEXT, "FILE", NULL, NULL, "fields of the collection, as JSON", 0, 0},
    {"key-field", OPTION_TEXT, "NAME", NULL, NULL, "name of the key, by default id", 0, 0},
    {"vector-field", OPTION_TEXT, "NAME", NULL, NULL, "name of the vector, by default vector", 0,
     0},
    {"code", OPTION_TEXT, "KIND", "auto", "auto|pq|opq|scalar",
     "codes kept in memory; auto tries all", 0, 0},
    {"own-distortion", OPTION_TEXT, "WHETHER", "auto", "auto|yes|no",
     "a byte of each code says how far off it is; auto tries both", 0, 0},
    {"code-bytes", OPTION_NUMBER, "N", NULL, NULL,
     "bytes of codes a row, by default dim/4 within 16..192", 1, 32767},
    {"store", OPTION_TEXT, "FORM", "auto", "auto|f32|f16|8bit",
     "vectors on the pages; auto: f16 for floats, integers as they are", 0, 0},
    {"no-originals", OPTION_FLAG, NULL, NULL, NULL,
     "do not keep the original floats: vectors cannot be given back", 0, 0},
    {"max-degree", OPTION_NUMBER, "R", "64", NULL, "edges a node at most", 4, 256},
    {"build-list", OPTION_NUMBER, "L", "100", NULL, "candidates per insertion", 4, 4096},
    {"serve-memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "memory it will be searched with: the rows asked for most that fit into it get the first "
     "pages",
     1, UINT64_MAX},
    {"calibrate", OPTION_TEXT, "FILE", NULL, NULL,
     "queries like those to come, to measure what --recall takes; by default rows are used", 0, 0},
    {"builder", OPTION_TEXT, "WHICH", "auto", "auto|batch|insert",
     "how the graph's candidates are found: all pairs in batches, or by search", 0, 0},
    {"memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of the build, by default 90 % of the machine", 1, UINT64_MAX},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "worker threads, by default all cores", 1, 1024},
    {"seed", OPTION_NUMBER, "N", "1", NULL, "same input, parameters and seed: same bytes", 0, 0},
    PROGRESS_OPTION,
    {0},
};

const struct command command_build = {
    .name = "build",
    .positional = "INPUT",
    .summary = "build an index from a vector file",
    .examples = "  annd build base.u8bin --output idx\n"
                "  annd build base.fbin --metric cosine --attributes rows.jsonl --output idx\n"
                "  annd build base.fbin --serve-memory 2G --calibrate queries.fbin --output idx\n",
    .options = options,
    .run = run,
};
