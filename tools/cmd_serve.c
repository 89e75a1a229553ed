/* annd serve: the service on a data directory, until SIGTERM. The one verb that reaches into src.
 */
#include <stdio.h>
#include <string.h>

#include "src/http.h"
#include "src/server.h"
#include "storage/data_directory.h"
#include "tools/commands.h"

/* What --insecure means, said for each address that other machines can reach. */
static void warn_if_open(const char *option, const char *text)
{
    char host[64];
    uint16_t port;
    bool loopback;

    if (!text || !strcmp(text, "off") ||
        http_parse_address(text, host, sizeof host, &port, &loopback, NULL) < 0 || loopback)
        return;
    fprintf(stderr,
            "annd: warning: --insecure: whoever can reach %s %s can search and read every vector "
            "and attribute;\n  there is no password and no TLS, what travels can be read and "
            "changed on the way\n",
            option, text);
}

/* ERR_BUSY is said of a port too. That somebody holds the data directory has an exit code of its
 * own, and only the lock can tell. */
static bool data_is_held(const char *data)
{
    struct error err = ERROR_INIT;
    struct data_directory *dd;

    if (data_directory_open(vfs_posix(), data, false, &dd, &err) == 0)
        data_directory_close(dd);
    return err.code == ERR_BUSY;
}

static int run(const struct arguments *arguments, struct error *err)
{
    struct server_options server = {
        .data = option_text(arguments, "data"),
        .listen = option_text(arguments, "listen"),
        .metrics_listen = option_text(arguments, "metrics-listen"),
        .memory_bytes = option_u64(arguments, "memory"),
        .threads = option_u32(arguments, "threads"),
        .prefer_latency = !strcmp(option_text(arguments, "prefer"), "latency"),
        .insecure = option_flag(arguments, "insecure"),
    };
    char reason[256];

    if (!server.data) {
        fprintf(stderr, "annd: annd serve needs --data DATA\n"
                        "  annd attach DIR --data DATA --as NAME puts an index there\n");
        return EXIT_USAGE;
    }
    if (reader_backend_parse(option_text(arguments, "io"), &server.backend, err) < 0)
        return -1;
    reader_probe(reason); /* forks: before any thread */
    if (server.insecure) {
        warn_if_open("--listen", server.listen);
        warn_if_open("--metrics-listen", server.metrics_listen);
    }
    if (server_run(&server, err) == 0)
        return EXIT_DONE;
    if (err->code == ERR_NOT_FOUND)
        error_remedy(err, "annd attach DIR --data %s --as NAME puts an index there", server.data);
    if (err->code != ERR_BUSY || data_is_held(server.data))
        return -1;
    fprintf(stderr, "annd: %s\n", err->message);
    return EXIT_FAILED;
}

static const struct option options[] = {
    {"data", OPTION_TEXT, "DATA", NULL, NULL, "data directory to serve", 0, 0},
    {"listen", OPTION_TEXT, "ADDR:PORT", SERVER_LISTEN_DEFAULT, NULL, "where clients connect", 0,
     0},
    {"metrics-listen", OPTION_TEXT, "ADDR:PORT", NULL, NULL,
     "health and metrics, or off; by default port 9091 beside --listen", 0, 0},
    {"memory", OPTION_SIZE, "SIZE", NULL, NULL,
     "bound of the server's memory, by default half of what there is", 0, 0},
    {"threads", OPTION_NUMBER, "N", NULL, NULL, "search threads, by default all cores", 1, 256},
    {"prefer", OPTION_TEXT, "WHAT", "throughput", "latency|throughput",
     "few reads outstanding and more of them a query, or as many as the drive serves", 0, 0},
    {"io", OPTION_TEXT, "HOW", "auto", "auto|uring|pread", "reader backend", 0, 0},
    {"insecure", OPTION_FLAG, NULL, NULL, NULL,
     "let other machines connect, without password or TLS", 0, 0},
    {0},
};

const struct command command_serve = {
    .name = "serve",
    .positional = "",
    .summary = "answer searches over HTTP",
    .examples = "  annd serve --data data\n"
                "  annd serve --data data --listen 127.0.0.1:19530 --memory 4G\n",
    .options = options,
    .run = run,
};
