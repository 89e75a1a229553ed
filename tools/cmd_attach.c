/* annd attach: puts an index that `annd build` made into a data directory, under a name. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "index/attach.h"
#include "tools/commands.h"
#include "tools/progress.h"

static void warn(const char *sentence)
{
    fprintf(stderr, "annd: warning: %s\n", sentence);
}

/* Moving a collection's own folder away would take it from the collection that has it. */
static int refuse_move_from_inside(const char *path, const char *data, struct error *err)
{
    char *inner = realpath(path, NULL), *outer = realpath(data, NULL);
    size_t bytes = outer ? strlen(outer) : 0;
    int rc = 0;

    if (inner && outer && !strncmp(inner, outer, bytes) && (inner[bytes] == '/' || !inner[bytes])) {
        error_set(err, ERR_INVALID, "%s lies inside %s and cannot be moved from there", path, data);
        error_remedy(err, "leave --move away: both collections can share the files");
        rc = -1;
    }
    free(inner);
    free(outer);
    return rc;
}

static void print_result(const char *path, const char *data, const char *name,
                         enum attach_mode mode, const struct attach_result *result)
{
    printf("%s: attached to %s as %s, %" PRIu64 " rows; %u files, %.1f MiB %s; %" PRIu64
           " blocks and %" PRIu64 " edges verified\n",
           path, data, name, result->row_count, result->file_count,
           (double)result->bytes / (1 << 20),
           mode == ATTACH_MOVE ? "moved"
           : result->copied    ? "copied"
                               : "hard-linked",
           result->check.blocks, result->check.edges);
}

static int run(const struct arguments *arguments, struct error *err)
{
    const char *path = arguments->positional[0];
    const char *data = option_text(arguments, "data"), *name = option_text(arguments, "as");
    enum attach_mode mode = option_flag(arguments, "move")   ? ATTACH_MOVE
                            : option_flag(arguments, "copy") ? ATTACH_COPY
                                                             : ATTACH_LINK;
    struct attach_result result;
    struct job *job;
    int rc;

    if (!data || !name) {
        fprintf(stderr, "annd: annd attach needs --data DATA and --as NAME\n");
        return EXIT_USAGE;
    }
    if (option_flag(arguments, "move") && option_flag(arguments, "copy")) {
        fprintf(stderr, "annd: --move and --copy exclude each other\n");
        return EXIT_USAGE;
    }
    if (attach_name_check(name, err) < 0) {
        fprintf(stderr, "annd: --as: %s\n", err->message);
        return EXIT_USAGE;
    }
    if (mode == ATTACH_MOVE && refuse_move_from_inside(path, data, err) < 0)
        return -1;
    job = progress_job(arguments, err);
    if (!job)
        return -1;
    rc = attach_index(vfs_posix(), path, data, name, mode, job, warn, &result, err);
    progress_end(job);
    if (rc < 0)
        return -1;
    print_result(path, data, name, mode, &result);
    if (result.source_left)
        fprintf(stderr,
                "annd: warning: not everything in %s could be removed; the collection does "
                "not need it\n",
                path);
    return EXIT_DONE;
}

static const struct option options[] = {
    {"data", OPTION_TEXT, "DATA", NULL, NULL, "data directory, made if missing", 0, 0},
    {"as", OPTION_TEXT, "NAME", NULL, NULL, "name of the collection", 0, 0},
    {"move", OPTION_FLAG, NULL, NULL, NULL, "take the files away from DIR", 0, 0},
    {"copy", OPTION_FLAG, NULL, NULL, NULL, "copy the files, from any file system", 0, 0},
    PROGRESS_OPTION,
    {0},
};

const struct command command_attach = {
    .name = "attach",
    .positional = "DIR",
    .summary = "put an index into a data directory, for annd serve",
    .examples = "  annd attach idx --data data --as images\n"
                "  annd attach /other/disk/idx --data data --as images --copy\n",
    .options = options,
    .run = run,
};
