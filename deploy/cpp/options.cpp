#include "options.h"

#include <cstdlib>
#include <functional>
#include <map>

#include "fault.h"

namespace dcn {
namespace {

// Hands out the words of the command line.
class Words {
  public:
    Words(int count, char** words) : words_(words + 1, words + count) {}

    bool more() const { return at_ < words_.size(); }
    // Whether a value comes next; a negative number would be one.
    bool value_next() const { return more() && (words_[at_].rfind("--", 0) != 0 && words_[at_] != "-d"); }
    const std::string& take() { return words_[at_++]; }

    std::string text(const std::string& flag) {
        if (!value_next()) throw Fault(flag + ": expected a value behind it");
        return take();
    }

    int whole(const std::string& flag, int least) {
        const std::string word = text(flag);
        char* end = nullptr;
        const long value = std::strtol(word.c_str(), &end, 10);
        if (word.empty() || *end || value < least || value > 1 << 30)
            throw Fault(flag + " " + word + ": expected a whole number, " + std::to_string(least) + " or more");
        return static_cast<int>(value);
    }

    double share(const std::string& flag) {
        const std::string word = text(flag);
        char* end = nullptr;
        const double value = std::strtod(word.c_str(), &end);
        if (word.empty() || *end || !(value >= 0 && value <= 1))
            throw Fault(flag + " " + word + ": must lie between 0 and 1");
        return value;
    }

  private:
    std::vector<std::string> words_;
    std::size_t at_ = 0;
};

using Setter = std::function<void(Options&, Words&, const std::string&)>;

Setter truth(bool Options::* field, bool value = true) {
    return [=](Options& options, Words&, const std::string&) { options.*field = value; };
}

Setter text(std::string Options::* field) {
    return [=](Options& options, Words& words, const std::string& flag) { options.*field = words.text(flag); };
}

const std::map<std::string, Setter>& flags() {
    static const Setter size = [](Options& o, Words& words, const std::string& flag) {
        o.frame_height = o.frame_width = words.whole(flag, 1);
        if (words.value_next()) o.frame_width = words.whole(flag, 1);
    };
    static const std::map<std::string, Setter> known = {
        {"-d", [](Options& o, Words& words, const std::string& flag) {
             o.model = words.text(flag);
             o.source = words.text("-d " + o.model);
         }},
        {"--imgsz", size},
        {"--img", size},
        {"--img-size", size},
        {"--batch-size", [](Options& o, Words& w, const std::string& flag) { o.batch = w.whole(flag, 1); }},
        {"--conf-thres", [](Options& o, Words& w, const std::string& f) { o.limits.confidence = w.share(f); }},
        {"--iou-thres", [](Options& o, Words& w, const std::string& f) { o.limits.iou = w.share(f); }},
        {"--max-det", [](Options& o, Words& w, const std::string& f) { o.limits.most = w.whole(f, 1); }},
        {"--classes", [](Options& o, Words& w, const std::string& f) {
             do o.limits.classes.push_back(w.whole(f, 0));
             while (w.value_next());
         }},
        {"--agnostic-nms", [](Options& o, Words&, const std::string&) { o.limits.agnostic = true; }},
        {"--line-thickness", [](Options& o, Words& w, const std::string& f) { o.line_width = w.whole(f, 0); }},
        {"--project", text(&Options::project)},
        {"--name", text(&Options::name)},
        {"--device", text(&Options::device)},
        {"--plugin", text(&Options::plugin)},
        {"--exist-ok", truth(&Options::exist_ok)},
        {"--nosave", truth(&Options::save_pictures, false)},
        {"--save-txt", truth(&Options::save_text)},
        {"--save-conf", truth(&Options::save_confidence)},
        {"--hide-labels", truth(&Options::draw_labels, false)},
        {"--hide-conf", truth(&Options::draw_confidence, false)},
        {"--help", truth(&Options::help)},
        {"-h", truth(&Options::help)},
    };
    return known;
}

}  // namespace

Options parse_options(int count, char** words) {
    Options options;
    Words rest(count, words);
    while (rest.more()) {
        const std::string flag = rest.take();
        const auto found = flags().find(flag);
        if (found == flags().end()) throw Fault(flag + ": unknown flag (see --help)");
        found->second(options, rest, flag);
    }
    if (options.help) return options;
    if (options.model.empty()) throw Fault("expected -d MODEL FOLDER (see --help)");
    if (options.save_confidence && !options.save_text)
        throw Fault("--save-conf: a column of the label files; add --save-txt");
    return options;
}

std::string usage(const std::string& program, const std::string& model) {
    return "usage: " + program + " -d " + model +
           " FOLDER [flags]\n"
           "Finds objects in the pictures of a folder (or in one picture), as detect.py does.\n\n"
           "  --conf-thres P      lowest confidence kept (0.25)\n"
           "  --iou-thres IOU     suppression removes boxes that overlap a better one by more (0.45)\n"
           "  --max-det N         most detections an image (1000)\n"
           "  --classes N ...     only these class numbers\n"
           "  --agnostic-nms      boxes of different classes suppress each other too\n"
           "  --imgsz N [N]       size of the input, for files that take any (640)\n"
           "  --batch-size N      pictures at once, for files that take several (1)\n"
           "  --device D          cpu, 0, 1, ... (what the file was made for)\n"
           "  --plugin FILE       library of plugins that an .engine needs\n"
           "  --project DIR --name NAME --exist-ok    where results go (runs/detect/exp, exp2, ...)\n"
           "  --save-txt --save-conf                  labels/NAME.txt: class cx cy w h [confidence]\n"
           "  --nosave                                no annotated pictures\n"
           "  --line-thickness N --hide-labels --hide-conf\n";
}

}  // namespace dcn
