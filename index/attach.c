/* The index is opened where it lies first: whatever is wrong with it is said before the data
 * directory is touched. Links share bytes with files that somebody may still write to, so what
 * counts is the check of the linked files, after they were synced.
 *
 * A move is links, publication, removal, in this order: until the MANIFEST names the collection the
 * index stays whole at its old place, because the next open of the data directory throws away a
 * .tmp that nobody names. */
#include "index/attach.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "storage/data_directory.h"
#include "storage/file.h"

#define COPY_BYTES (4u << 20)

struct attach {
    struct vfs *vfs;
    const char *source;
    enum attach_mode mode;
    char **files; /* relative to the source, sorted */
    uint32_t file_count;
    bool copy;
    char aside[FILE_PATH_MAX]; /* collections/N.tmp */
    char target[FILE_PATH_MAX];
    struct job *job;
    struct attach_result *result;
};

int attach_name_check(const char *name, struct error *err)
{
    size_t bytes = strlen(name);

    if (!bytes)
        return error_set(err, ERR_INVALID, "a collection's name should not be empty");
    if (bytes > DATA_NAME_MAX)
        return error_set(err, ERR_INVALID,
                         "'%.40s...' has %zu bytes, a collection's name at most %u", name, bytes,
                         DATA_NAME_MAX);
    for (size_t i = 0; i < bytes; i++) {
        bool letter = (name[i] >= 'a' && name[i] <= 'z') || (name[i] >= 'A' && name[i] <= 'Z') ||
                      name[i] == '_';
        bool digit = name[i] >= '0' && name[i] <= '9';

        if (!letter && !(i && digit))
            return error_set(err, ERR_INVALID, "'%s' cannot be a collection's name: %s", name,
                             i ? "it may only have letters, digits and underscores"
                               : "the first character must be a letter or an underscore");
    }
    return 0;
}

static int compare_names(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* "seg-x" of "seg-x/f0.pages" into out; "" for a file of the directory itself. */
static void folder_of(const char *file, char out[FILE_PATH_MAX])
{
    const char *slash = strrchr(file, '/');

    snprintf(out, FILE_PATH_MAX, "%.*s", slash ? (int)(slash - file) : 0, file);
}

/* Whether file i is the first of a folder inside the directory: those of one folder are in a row.
 */
static bool starts_folder(const struct attach *a, uint32_t i)
{
    char before[FILE_PATH_MAX], now[FILE_PATH_MAX];

    folder_of(a->files[i], now);
    if (!now[0] || i == 0)
        return now[0] != 0;
    folder_of(a->files[i - 1], before);
    return strcmp(before, now) != 0;
}

struct link_search {
    const struct attach *attach;
    const char *folder;
    char found[FILE_PATH_MAX]; /* "" while nothing is wrong */
};

static void find_link(void *context, const char *name, enum vfs_kind kind)
{
    struct link_search *search = context;
    char joined[FILE_PATH_MAX];
    const char *key = joined;

    if (kind != VFS_OTHER || search->found[0])
        return;
    if (snprintf(joined, sizeof joined, "%s%s%s", search->folder, *search->folder ? "/" : "",
                 name) >= (int)sizeof joined)
        return;
    if (bsearch(&key, search->attach->files, search->attach->file_count,
                sizeof *search->attach->files, compare_names))
        memcpy(search->found, joined, sizeof joined);
}

/* A hard link to a symbolic link would put a pointer out of the data directory into it. */
static int refuse_symbolic_links(const struct attach *a, const char *folder, struct error *err)
{
    struct link_search search = {.attach = a, .folder = folder};
    char path[FILE_PATH_MAX];

    if (file_path_join(path, a->source, folder, err) < 0)
        return -1;
    int rc = a->vfs->list(a->vfs, path, find_link, &search);

    if (rc < 0)
        return error_set_errno(err, rc, "%s: cannot list the folder", path);
    if (!search.found[0])
        return 0;
    error_set(err, ERR_INVALID, "%s/%s is a symbolic link, which cannot be linked or moved",
              a->source, search.found);
    error_remedy(err, "--copy copies what it points to");
    return -1;
}

/* Everything that can be refused by looking: kinds, file systems, space. */
static int survey(struct attach *a, const char *data, struct error *err)
{
    struct vfs_stat data_stat, st;
    char path[FILE_PATH_MAX], folder[FILE_PATH_MAX];
    uint64_t free_bytes;

    if (file_stat(a->vfs, data, &data_stat, err) < 0)
        return -1;
    for (uint32_t i = 0; i < a->file_count; i++) {
        if (file_path_join(path, a->source, a->files[i], err) < 0 ||
            file_stat(a->vfs, path, &st, err) < 0)
            return -1;
        if (st.kind != VFS_FILE)
            return error_set(err, ERR_INVALID, "%s is not a regular file", path);
        a->result->bytes += st.bytes;
        if (st.device == data_stat.device || a->mode == ATTACH_COPY)
            continue;
        if (a->mode == ATTACH_LINK) {
            error_set(err, ERR_UNSUPPORTED,
                      "%s and %s are on different file systems, files cannot be shared", path,
                      data);
            error_remedy(err, "--copy keeps a second copy, --move takes the index away from %s",
                         a->source);
            return -1;
        }
        a->copy = true;
    }
    if (a->mode != ATTACH_COPY && refuse_symbolic_links(a, "", err) < 0)
        return -1;
    for (uint32_t i = 0; a->mode != ATTACH_COPY && i < a->file_count; i++)
        if (starts_folder(a, i)) {
            folder_of(a->files[i], folder);
            if (refuse_symbolic_links(a, folder, err) < 0)
                return -1;
        }
    if (a->copy && a->vfs->space(a->vfs, data, &free_bytes) == 0 && free_bytes < a->result->bytes)
        return error_set(err, ERR_NO_SPACE, "%s has %llu bytes free, the copy of %s takes %llu",
                         data, (unsigned long long)free_bytes, a->source,
                         (unsigned long long)a->result->bytes);
    return 0;
}

static int copy_file(struct attach *a, const char *from, const char *to, struct error *err)
{
    struct vfs_file *in = NULL, *out = NULL;
    uint8_t *buffer = malloc(COPY_BYTES);
    uint64_t bytes;
    int rc = -1;

    if (!buffer) {
        error_set(err, ERR_NOMEM, "no memory to copy %s", from);
        goto done;
    }
    in = file_open(a->vfs, from, VFS_READ, err);
    if (!in || file_size(in, from, &bytes, err) < 0)
        goto done;
    out = file_open(a->vfs, to, VFS_WRITE | VFS_CREATE, err);
    if (!out)
        goto done;
    for (uint64_t at = 0; at < bytes; at += COPY_BYTES) {
        size_t piece = bytes - at < COPY_BYTES ? (size_t)(bytes - at) : COPY_BYTES;

        if (file_read_exact(in, from, buffer, piece, at, err) < 0 ||
            file_write_full(out, to, buffer, piece, at, err) < 0 ||
            job_advance(a->job, piece, err) < 0)
            goto done;
    }
    rc = file_sync(out, to, err);
done:
    file_close(in, from, NULL);
    if (file_close(out, to, rc == 0 ? err : NULL) < 0)
        rc = -1;
    free(buffer);
    return rc;
}

/* 1: this pair of places cannot share a file, copy it. */
static int link_file(struct attach *a, const char *from, const char *to, struct error *err)
{
    struct vfs_file *file;
    struct vfs_stat st;
    int called = a->vfs->link(a->vfs, from, to);

    if (called < 0) {
        bool impossible =
            called == -EXDEV || called == -EPERM || called == -EMLINK || called == -EOPNOTSUPP;

        if (impossible && a->mode == ATTACH_MOVE)
            return 1;
        error_set_errno(err, called, "%s: cannot link to %s", from, to);
        if (impossible)
            error_remedy(err, "--copy keeps a second copy, --move takes the index away from %s",
                         a->source);
        return -1;
    }
    /* Whoever put the file there may not have synced it. */
    file = file_open(a->vfs, to, VFS_READ, err);
    if (!file)
        return -1;
    int rc = file_sync(file, to, err);

    file_close(file, to, NULL);
    if (rc < 0 || file_stat(a->vfs, to, &st, err) < 0)
        return -1;
    return job_advance(a->job, st.bytes, err);
}

static int sync_folders(const struct attach *a, struct error *err)
{
    char path[FILE_PATH_MAX], folder[FILE_PATH_MAX];

    for (uint32_t i = 0; i < a->file_count; i++)
        if (starts_folder(a, i)) {
            folder_of(a->files[i], folder);
            if (file_path_join(path, a->aside, folder, err) < 0 ||
                file_dirsync(a->vfs, path, err) < 0)
                return -1;
        }
    return file_dirsync(a->vfs, a->aside, err);
}

/* Fills collections/N.tmp, which is there. */
static int fill(struct attach *a, struct error *err)
{
    char from[FILE_PATH_MAX], to[FILE_PATH_MAX], folder[FILE_PATH_MAX];

    job_phase(a->job, a->copy ? "copy" : "link", a->result->bytes);
    for (uint32_t i = 0; i < a->file_count; i++) {
        if (starts_folder(a, i)) {
            folder_of(a->files[i], folder);
            if (file_path_join(to, a->aside, folder, err) < 0 || file_mkdir(a->vfs, to, err) < 0)
                return -1;
        }
        if (file_path_join(from, a->source, a->files[i], err) < 0 ||
            file_path_join(to, a->aside, a->files[i], err) < 0)
            return -1;
        int linked = a->copy ? 1 : link_file(a, from, to, err);

        if (linked < 0)
            return -1;
        if (linked == 1) {
            a->copy = true;
            if (copy_file(a, from, to, err) < 0)
                return -1;
        }
    }
    return sync_folders(a, err);
}

/* The MANIFEST that names the collection is out; what goes wrong now is not a failure to attach. */
static void remove_source(struct attach *a)
{
    char path[FILE_PATH_MAX], folder[FILE_PATH_MAX];

    for (uint32_t i = 0; i < a->file_count; i++)
        if (file_path_join(path, a->source, a->files[i], NULL) < 0 ||
            a->vfs->unlink(a->vfs, path) < 0)
            a->result->source_left = true;
    /* The generation before, kept by manifest_publish(). */
    if (file_path_join(path, a->source, "MANIFEST.1", NULL) == 0)
        a->vfs->unlink(a->vfs, path);
    for (uint32_t i = 0; i < a->file_count; i++)
        if (starts_folder(a, i)) {
            folder_of(a->files[i], folder);
            if (file_path_join(path, a->source, folder, NULL) < 0 ||
                a->vfs->rmdir(a->vfs, path) < 0)
                a->result->source_left = true;
        }
    if (a->vfs->rmdir(a->vfs, a->source) < 0)
        a->result->source_left = true;
    file_path_folder(path, a->source);
    file_dirsync(a->vfs, path, NULL);
}

/* The data directory reported a failure whose outcome only its MANIFEST knows: reads it again.
 * True when the collection is in it after all. The folder goes when it is certainly not. */
static bool settle(struct attach *a, const char *data)
{
    struct data_directory *dd;
    bool named;

    if (data_directory_open(a->vfs, data, false, &dd, NULL) < 0)
        return false; /* left alone: the next open reports it */
    named = data_directory_get(dd, a->result->number) != NULL;
    if (!named)
        file_remove_all(a->vfs, a->target, NULL);
    data_directory_close(dd);
    return named;
}

/* What the check found is told of the index itself: collections/N.tmp will be gone by the time
 * somebody reads it. */
static int check(struct attach *a, struct error *err)
{
    struct error found = ERROR_INIT;
    size_t aside_bytes = strlen(a->aside);
    const char *place;

    if (index_directory_check(a->vfs, a->aside, a->job, &a->result->check, &found) == 0)
        return 0;
    place = strstr(found.message, a->aside);
    if (!place)
        return error_set(err, found.code, "%s", found.message);
    return error_set(err, found.code, "%.*s%s%s", (int)(place - found.message), found.message,
                     a->source, place + aside_bytes);
}

static int refuse_taken(struct data_directory *dd, const char *name, struct error *err)
{
    const struct data_collection *found = data_directory_find(dd, NULL, name);

    if (!found)
        return 0;
    if (strcmp(found->name, name) == 0)
        error_set(err, ERR_EXISTS, "%s has a collection '%s' already", data_directory_path(dd),
                  name);
    else
        error_set(err, ERR_EXISTS, "%s has an alias '%s' already, of collection '%s'",
                  data_directory_path(dd), name, found->name);
    error_remedy(err, "attach under another name");
    return -1;
}

static int count_rows(struct attach *a, struct error *err)
{
    struct manifest *manifest = NULL;
    char path[FILE_PATH_MAX], entry[64];
    uint64_t segments, rows;
    int rc = -1;

    if (file_path_join(path, a->target, "MANIFEST", err) < 0 ||
        manifest_read(a->vfs, MANIFEST_INDEX, path, &manifest, err) < 0 ||
        manifest_get_u64_in(manifest, "segment.count", 0, INDEX_SEGMENT_MAX, &segments, err) < 0)
        goto done;
    for (uint32_t i = 0; i < segments; i++) {
        snprintf(entry, sizeof entry, "segment.%03u.rows", i);
        if (manifest_get_u64(manifest, entry, &rows, err) < 0)
            goto done;
        a->result->row_count += rows;
    }
    rc = 0;
done:
    manifest_free(manifest);
    return rc;
}

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

int attach_index(struct vfs *vfs, const char *path, const char *data, const char *name,
                 enum attach_mode mode, struct job *job, void (*warn)(const char *sentence),
                 struct attach_result *result, struct error *err)
{
    struct attach a = {.vfs = vfs,
                       .source = path,
                       .mode = mode,
                       .copy = mode == ATTACH_COPY,
                       .job = job,
                       .result = result};
    struct data_directory *dd = NULL;
    bool aside = false, placed = false;
    int rc = -1;

    memset(result, 0, sizeof *result);
    if (attach_name_check(name, err) < 0 ||
        index_directory_files(vfs, path, &a.files, &a.file_count, err) < 0)
        goto done;
    qsort(a.files, a.file_count, sizeof *a.files, compare_names);
    result->file_count = a.file_count;
    if (data_directory_open(vfs, data, true, &dd, err) < 0) {
        if (err && err->code == ERR_BUSY)
            error_remedy(err, "stop the server that has it, attach, and start it again");
        goto done;
    }
    result->warnings = data_directory_warning_count(dd);
    for (uint32_t i = 0; warn && i < result->warnings; i++)
        warn(data_directory_warning(dd, i));
    result->number = data_directory_new_number(dd);
    if (refuse_taken(dd, name, err) < 0 || survey(&a, data, err) < 0 ||
        data_directory_collection_path(dd, result->number, a.target, err) < 0)
        goto done;
    if (snprintf(a.aside, sizeof a.aside, "%s.tmp", a.target) >= (int)sizeof a.aside) {
        error_set(err, ERR_INVALID, "the path of %s is too long", data);
        goto done;
    }
    if (file_mkdir(vfs, a.aside, err) < 0)
        goto done;
    aside = true;
    if (fill(&a, err) < 0 || check(&a, err) < 0 || file_rename(vfs, a.aside, a.target, err) < 0)
        goto done;
    aside = false;
    placed = true;
    if (count_rows(&a, err) < 0)
        goto done;
    const struct data_collection collection = {
        .number = result->number, .name = name, .load = true, .created_ms = now_ms()};

    if (data_directory_add(dd, &collection, err) < 0)
        goto done;
    placed = false;
    result->copied = a.copy;
    rc = 0;
done:
    if (aside)
        file_remove_all(vfs, a.aside, NULL);
    data_directory_close(dd);
    if (placed && settle(&a, data)) {
        result->copied = a.copy;
        error_clear(err);
        rc = 0;
    }
    if (rc == 0 && mode == ATTACH_MOVE)
        remove_source(&a);
    file_names_free(a.files, a.file_count);
    return rc;
}
