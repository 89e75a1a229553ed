/* Reading goes through options_parse(), so that a record is held to the same rules as a user. */
#include "tools/build_record.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tools/commands.h"

#define RECORD_VERSION 1u
#define NAME_BYTES 96u

/* Options whose value is a file that the index is made of. */
static const char *const file_options[] = {"keys", "attributes", "schema", "calibrate"};
#define FILE_OPTION_COUNT (sizeof file_options / sizeof file_options[0])

static bool is_file_option(const char *name)
{
    for (size_t i = 0; i < FILE_OPTION_COUNT; i++)
        if (!strcmp(file_options[i], name))
            return true;
    return false;
}

/* Of this run alone, or kept otherwise. */
static bool is_left_out(const char *name)
{
    return !strcmp(name, "output") || !strcmp(name, "progress") || !strcmp(name, "memory") ||
           is_file_option(name);
}

static uint64_t time_of(const struct stat *st)
{
    return (uint64_t)st->st_mtim.tv_sec * 1000000000u + (uint64_t)st->st_mtim.tv_nsec;
}

static int file_look(const char *path, struct stat *st, struct error *err)
{
    if (stat(path, st) < 0)
        return error_set_errno(err, errno, "%s: cannot stat", path);
    return 0;
}

static int add_file(struct manifest *record, const char *name, const char *path, struct error *err)
{
    char entry[NAME_BYTES], *whole = realpath(path, NULL);
    struct stat st;
    int rc = -1;

    if (!whole) {
        error_set_errno(err, errno, "%s: cannot find", path);
        goto done;
    }
    if (file_look(whole, &st, err) < 0)
        goto done;
    snprintf(entry, sizeof entry, "file.%s.path", name);
    if (manifest_set_text(record, entry, whole, err) < 0)
        goto done;
    snprintf(entry, sizeof entry, "file.%s.bytes", name);
    if (manifest_set_u64(record, entry, (uint64_t)st.st_size, err) < 0)
        goto done;
    snprintf(entry, sizeof entry, "file.%s.mtime_ns", name);
    rc = manifest_set_u64(record, entry, time_of(&st), err);
done:
    free(whole);
    return rc;
}

int build_record_make(const struct arguments *arguments, uint64_t memory_bytes,
                      struct manifest **out, struct error *err)
{
    const struct option *options = arguments->command->options;
    struct manifest *record = manifest_new(MANIFEST_JOB);
    char entry[NAME_BYTES], memory[32];
    int rc = -1;

    if (!record)
        return error_set(err, ERR_NOMEM, "no memory for the record of a build");
    snprintf(memory, sizeof memory, "%llu", (unsigned long long)memory_bytes);
    if (manifest_set_text(record, "job", "build", err) < 0 ||
        manifest_set_u64(record, "record.version", RECORD_VERSION, err) < 0 ||
        manifest_set_text(record, "annd.version", ANND_VERSION, err) < 0 ||
        manifest_set_text(record, "option.memory", memory, err) < 0 ||
        add_file(record, "input", arguments->positional[0], err) < 0)
        goto done;
    for (size_t i = 0; i < FILE_OPTION_COUNT; i++) {
        const char *path = option_text(arguments, file_options[i]);

        if (path && add_file(record, file_options[i], path, err) < 0)
            goto done;
    }
    for (int i = 0; options[i].name; i++) {
        if (!arguments->values[i] || is_left_out(options[i].name))
            continue;
        snprintf(entry, sizeof entry, "option.%s", options[i].name);
        if (manifest_set_text(record, entry, arguments->values[i], err) < 0)
            goto done;
    }
    *out = record;
    record = NULL; /* moved to the caller */
    rc = 0;
done:
    manifest_free(record);
    return rc;
}

/* Entries "option.X" of options there are none of any more. */
static int check_names(const struct manifest *record, const char *where, struct error *err)
{
    const struct option *options = command_build.options;

    for (uint32_t i = 0; i < manifest_count(record); i++) {
        char text[8];
        const char *name = manifest_entry(record, i, text, sizeof text);
        bool known = strncmp(name, "option.", 7) != 0;

        for (int o = 0; options[o].name && !known; o++)
            known = !strcmp(options[o].name, name + 7);
        if (!known)
            return error_set(err, ERR_UNSUPPORTED, "%s: annd build has no option --%s", where,
                             name + 7);
    }
    return 0;
}

int build_record_read(const struct manifest *record, const char *where, struct arguments *out,
                      struct error *err)
{
    const struct option *options = command_build.options;
    static char dashed[OPTIONS_MAX][64]; /* the words live as long as the arguments do */
    char *words[2 * OPTIONS_MAX + 2], entry[NAME_BYTES];
    struct error parse_err = ERROR_INIT;
    const char *text, *path;
    uint64_t version;
    int count = 0;
    bool help;

    if (manifest_get_text(record, "job", &text, err) < 0 ||
        manifest_get_u64(record, "record.version", &version, err) < 0 ||
        manifest_get_text(record, "annd.version", &path, err) < 0)
        return -1;
    if (strcmp(text, "build") != 0 || version != RECORD_VERSION || strcmp(path, ANND_VERSION) != 0)
        return error_set(err, ERR_UNSUPPORTED,
                         "%s: a job '%.32s' of record version %llu, begun by annd %.32s; this is "
                         "annd %s, which goes on with builds of its own",
                         where, text, (unsigned long long)version, path, ANND_VERSION);
    if (check_names(record, where, err) < 0 ||
        manifest_get_text(record, "file.input.path", &path, err) < 0)
        return -1;
    for (int i = 0; options[i].name && i < (int)OPTIONS_MAX; i++) {
        snprintf(entry, sizeof entry,
                 is_file_option(options[i].name) ? "file.%s.path" : "option.%s", options[i].name);
        if (!manifest_has(record, entry))
            continue;
        if (manifest_get_text(record, entry, &text, err) < 0)
            return -1;
        snprintf(dashed[i], sizeof dashed[i], "--%s", options[i].name);
        words[count++] = dashed[i];
        if (options[i].kind != OPTION_FLAG)
            words[count++] = (char *)text; /* options_parse() only reads them */
    }
    words[count++] = (char *)"--";
    words[count++] = (char *)path;
    if (options_parse(&command_build, count, words, out, &help, &parse_err) < 0)
        return error_set(err, ERR_CORRUPT, "%s: %s", where, parse_err.message);
    return 0;
}

static int check_file(const struct manifest *record, const char *name, struct error *err)
{
    struct error look_err = ERROR_INIT;
    char entry[NAME_BYTES];
    uint64_t bytes, time;
    const char *path;
    struct stat st;

    snprintf(entry, sizeof entry, "file.%s.path", name);
    if (!manifest_has(record, entry))
        return 0;
    if (manifest_get_text(record, entry, &path, err) < 0)
        return -1;
    snprintf(entry, sizeof entry, "file.%s.bytes", name);
    if (manifest_get_u64(record, entry, &bytes, err) < 0)
        return -1;
    snprintf(entry, sizeof entry, "file.%s.mtime_ns", name);
    if (manifest_get_u64(record, entry, &time, err) < 0)
        return -1;
    if (file_look(path, &st, &look_err) < 0) {
        if (look_err.code != ERR_NOT_FOUND)
            return error_set(err, look_err.code, "%s", look_err.message);
        return error_set(err, ERR_NOT_FOUND, "%s, which the index is built from, is gone", path);
    }
    if ((uint64_t)st.st_size != bytes)
        return error_set(err, ERR_INVALID,
                         "%s has changed since the build began: %llu bytes now, %llu then", path,
                         (unsigned long long)st.st_size, (unsigned long long)bytes);
    if (time_of(&st) != time)
        return error_set(err, ERR_INVALID,
                         "%s has changed since the build began: it was written to %.1f s %s", path,
                         time_of(&st) > time ? (double)(time_of(&st) - time) * 1e-9
                                             : (double)(time - time_of(&st)) * 1e-9,
                         time_of(&st) > time ? "later" : "earlier");
    return 0;
}

int build_record_check(const struct manifest *record, struct error *err)
{
    if (check_file(record, "input", err) < 0)
        return -1;
    for (size_t i = 0; i < FILE_OPTION_COUNT; i++)
        if (check_file(record, file_options[i], err) < 0)
            return -1;
    return 0;
}
