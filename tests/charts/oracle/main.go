// The oracle: KubeRay's own validation, asked about rendered manifests.
//
// It reads YAML documents on standard input and writes one line of JSON: the RayJobs and RayClusters among them, and what
// the operator says of each. Fields that the operator's types do not have are errors, too: the API server would drop
// them without a word.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	rayv1 "github.com/ray-project/kuberay/ray-operator/apis/ray/v1"
	"github.com/ray-project/kuberay/ray-operator/controllers/ray/utils"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

type verdict struct {
	Checked []string `json:"checked"`
	Errors  []string `json:"errors"`
}

func main() {
	result := verdict{Checked: []string{}, Errors: []string{}}
	for _, document := range documents(os.Stdin) {
		result.check([]byte(document))
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		panic(err)
	}
}

func documents(input io.Reader) []string {
	var found []string
	var lines []string
	scanner := bufio.NewScanner(input)
	scanner.Buffer(nil, 64<<20)
	for scanner.Scan() {
		if scanner.Text() == "---" {
			found = append(found, strings.Join(lines, "\n"))
			lines = nil
			continue
		}
		lines = append(lines, scanner.Text())
	}
	if err := scanner.Err(); err != nil {
		panic(err)
	}
	return append(found, strings.Join(lines, "\n"))
}

func (v *verdict) check(document []byte) {
	var meta struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
	}
	if err := yaml.Unmarshal(document, &meta); err != nil {
		v.Errors = append(v.Errors, fmt.Sprintf("not YAML: %v", err))
		return
	}
	if meta.APIVersion != "ray.io/v1" {
		return
	}
	var errs []error
	switch meta.Kind {
	case "RayJob":
		job := &rayv1.RayJob{}
		if err := yaml.UnmarshalStrict(document, job); err != nil {
			errs = append(errs, err)
			break
		}
		errs = append(errs, utils.ValidateRayJobMetadata(job.ObjectMeta), utils.ValidateRayJobSpec(job))
	case "RayCluster":
		cluster := &rayv1.RayCluster{}
		if err := yaml.UnmarshalStrict(document, cluster); err != nil {
			errs = append(errs, err)
			break
		}
		errs = append(errs, utils.ValidateRayClusterMetadata(cluster.ObjectMeta),
			utils.ValidateRayClusterUpgradeOptions(cluster),
			utils.ValidateRayClusterSpec(&cluster.Spec, cluster.Annotations))
	default:
		errs = append(errs, fmt.Errorf("no rules for %s", meta.Kind))
	}
	v.Checked = append(v.Checked, meta.Kind+"/"+meta.Name)
	for _, err := range errs {
		if err != nil {
			v.Errors = append(v.Errors, fmt.Sprintf("%s/%s: %v", meta.Kind, meta.Name, err))
		}
	}
}
