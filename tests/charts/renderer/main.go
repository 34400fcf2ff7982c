// The renderer: `helm template` as a service, for tests that render hundreds of times.
//
// It reads requests on standard input, a line of JSON each, and answers each with a line. The steps are those of Helm's own
// command (cmd/helm/template.go and install.go), calling the same functions; test_values.py compares the two.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"helm.sh/helm/v3/pkg/action"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/cli"
	"helm.sh/helm/v3/pkg/cli/values"
	"helm.sh/helm/v3/pkg/getter"
)

type request struct {
	Chart  string `json:"chart"`  // Its folder.
	Name   string `json:"name"`   // The release.
	Values string `json:"values"` // A file.
}

type answer struct {
	Text  string `json:"text"`
	Error string `json:"error"`
}

func main() {
	settings := cli.New()
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	answers := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var wanted request
		result := answer{}
		err := json.Unmarshal(lines.Bytes(), &wanted)
		if err == nil {
			result.Text, err = render(settings, wanted)
		}
		if err != nil {
			result.Error = err.Error()
		}
		if err := answers.Encode(result); err != nil {
			panic(err)
		}
	}
	if err := lines.Err(); err != nil {
		panic(err)
	}
}

func render(settings *cli.EnvSettings, wanted request) (string, error) {
	client := action.NewInstall(&action.Configuration{Log: func(string, ...interface{}) {}})
	client.DryRun = true
	client.DryRunOption = "true"
	client.Replace = true
	client.ClientOnly = true
	client.ReleaseName = wanted.Name
	client.Namespace = settings.Namespace()
	options := values.Options{ValueFiles: []string{wanted.Values}}
	given, err := options.MergeValues(getter.All(settings))
	if err != nil {
		return "", err
	}
	chart, err := loader.Load(wanted.Chart)
	if err != nil {
		return "", err
	}
	if err := action.CheckDependencies(chart, chart.Metadata.Dependencies); err != nil {
		return "", err
	}
	release, err := client.RunWithContext(context.Background(), chart, given)
	if err != nil {
		return "", err
	}
	text := strings.TrimSpace(release.Manifest) + "\n"
	for _, hook := range release.Hooks {
		text += fmt.Sprintf("---\n# Source: %s\n%s\n", hook.Path, hook.Manifest)
	}
	return text, nil
}
