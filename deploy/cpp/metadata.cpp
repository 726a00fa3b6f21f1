#include "metadata.h"

#include <cctype>
#include <cmath>
#include <cstdlib>

#include "fault.h"

namespace dcn {
namespace {

constexpr int kMaxSide = 65536;
constexpr int kMaxFormat = 1;  // of these entries; newer files are refused
constexpr std::size_t kMaxClasses = 100000, kMaxName = 200;

// A reader of the JSON that Python's json.dumps writes: texts, numbers, true and false, and lists and one object of them.
class Reader {
  public:
    Reader(const std::string& text, const std::string& source) : text_(text), source_(source) {}

    [[noreturn]] void refuse() const {
        throw Fault(source_ + ": what it says of itself cannot be read; was it written by export.py?");
    }

    bool take(char wanted) {
        space();
        if (at_ >= text_.size() || text_[at_] != wanted) return false;
        ++at_;
        return true;
    }

    void expect(char wanted) {
        if (!take(wanted)) refuse();
    }

    void end() {
        space();
        if (at_ != text_.size()) refuse();
    }

    double number() {
        space();
        const char* begin = text_.c_str() + at_;
        if (at_ >= text_.size() || !(std::isdigit(static_cast<unsigned char>(*begin)) || *begin == '-')) refuse();
        char* end = nullptr;
        const double value = std::strtod(begin, &end);
        at_ += static_cast<std::size_t>(end - begin);
        return value;
    }

    int whole(int least, int most) {
        const double value = number();
        if (!(value >= least && value <= most) || value != std::floor(value)) refuse();
        return static_cast<int>(value);
    }

    bool truth() {
        space();
        for (const auto& [word, value] : {std::pair<const char*, bool>{"true", true}, {"false", false}}) {
            const std::string wanted = word;
            if (text_.compare(at_, wanted.size(), wanted) == 0) {
                at_ += wanted.size();
                return value;
            }
        }
        refuse();
    }

    std::string string() {
        expect('"');
        std::string found;
        while (at_ < text_.size() && text_[at_] != '"') {
            if (text_[at_] != '\\') {
                found += text_[at_++];
                continue;
            }
            if (++at_ >= text_.size()) refuse();
            const char kind = text_[at_++];
            if (kind == 'u')
                append(found, code_point());
            else if (const std::size_t known = std::string("bfnrt\"\\/").find(kind); known != std::string::npos)
                found += "\b\f\n\r\t\"\\/"[known];
            else
                refuse();
        }
        expect('"');
        return found;
    }

  private:
    void space() {
        while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    }

    unsigned hex4() {
        if (at_ + 4 > text_.size()) refuse();
        unsigned value = 0;
        for (int i = 0; i < 4; ++i, ++at_) {
            const auto digit = static_cast<unsigned char>(text_[at_]);
            if (!std::isxdigit(digit)) refuse();
            value = 16 * value + static_cast<unsigned>(std::isdigit(digit) ? digit - '0' : std::tolower(digit) - 'a' + 10);
        }
        return value;
    }

    unsigned code_point() {
        const unsigned high = hex4();
        if (high < 0xD800 || high > 0xDBFF || text_.compare(at_, 2, "\\u") != 0) return high;
        at_ += 2;
        return 0x10000 + ((high - 0xD800) << 10) + (hex4() - 0xDC00);
    }

    static void append(std::string& text, unsigned code) {
        if (code < 0x80) {
            text += static_cast<char>(code);
            return;
        }
        const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        text += static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more);
        for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> 6 * i & 0x3F));
    }

    const std::string& text_;
    const std::string& source_;
    std::size_t at_ = 0;
};

// A class name for a terminal and a picture: cut at a letter's end, control characters shown and not obeyed.
std::string shown(std::string name) {
    if (name.size() > kMaxName) {
        std::size_t size = kMaxName;
        while (size > 0 && (static_cast<unsigned char>(name[size]) & 0xC0) == 0x80) --size;
        name.resize(size);
    }
    for (char& c : name)
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
    return name;
}

}  // namespace

std::map<std::string, std::string> parse_texts(const std::string& json, const std::string& source) {
    Reader reader(json, source);
    std::map<std::string, std::string> found;
    reader.expect('{');
    if (!reader.take('}')) {
        do {
            std::string key = reader.string();
            reader.expect(':');
            found[std::move(key)] = reader.string();
        } while (reader.take(','));
        reader.expect('}');
    }
    reader.end();
    return found;
}

Maker parse_maker(const std::string& json, const std::string& source) {
    Reader reader(json, source);
    Maker maker;
    reader.expect('{');
    do {
        const std::string key = reader.string();
        reader.expect(':');
        if (key == "module") {
            maker.module = reader.string();
        } else if (key == "version") {
            maker.version = reader.string();
        } else if (key == "plugin") {
            maker.plugin = reader.string();
            if (maker.plugin.find_first_of("/\\") != std::string::npos) reader.refuse();  // beside the engine, nowhere else
        } else if (key == "targets") {
            reader.expect('[');
            while (!reader.take(']')) {
                maker.targets.push_back(reader.whole(0, 10000));
                reader.take(',');
            }
        } else {
            reader.refuse();
        }
    } while (reader.take(','));
    reader.expect('}');
    reader.end();
    return maker;
}

std::string Maker::text() const {
    std::string cards;
    for (int target : targets)
        cards += (cards.empty() ? "" : ", ") + std::to_string(target / 10) + "." + std::to_string(target % 10);
    return module + " " + version + " for compute capability " + (cards.empty() ? "unknown" : cards);
}

Metadata parse_metadata(const std::map<std::string, std::string>& entries, const std::string& source) {
    for (const char* name : {"names", "stride", "imgsz"})
        if (!entries.count(name))
            throw Fault(source + ": holds no class names, stride and size; only files of export.py can be run");
    const auto text_of = [&](const char* name, const char* otherwise) {
        const auto found = entries.find(name);
        return found == entries.end() ? std::string(otherwise) : found->second;
    };
    const auto one = [&](const char* name, const char* otherwise, auto read) {
        const std::string text = text_of(name, otherwise);
        Reader reader(text, source);
        const auto value = read(reader);
        reader.end();
        return value;
    };
    if (one("format", "1", [](Reader& r) { return r.whole(0, 1 << 30); }) > kMaxFormat)
        throw Fault(source + ": written by a newer version of this program; export it again or update");
    Metadata meta;
    meta.stride = one("stride", "", [](Reader& r) { return r.whole(1, kMaxSide); });
    meta.batch = one("batch", "1", [](Reader& r) { return r.whole(1, kMaxSide); });
    meta.dynamic = one("dynamic", "false", [](Reader& r) { return r.truth(); });
    meta.half = one("half", "false", [](Reader& r) { return r.truth(); });
    one("imgsz", "", [&](Reader& r) {
        r.expect('[');
        meta.height = r.whole(1, kMaxSide);
        r.expect(',');
        meta.width = r.whole(1, kMaxSide);
        r.expect(']');
        return true;
    });
    one("names", "", [&](Reader& r) {
        r.expect('[');
        do meta.names.push_back(shown(r.string()));
        while (r.take(',') && meta.names.size() < kMaxClasses);
        r.expect(']');
        return true;
    });
    return meta;
}

}  // namespace dcn
